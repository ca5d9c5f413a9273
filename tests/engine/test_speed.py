"""Speed and memory options: the plain detector's names, losses, gradients and detections."""

import copy
import shutil

import pytest
import torch
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from retina_plugin.engine import Trainer, speed
from retina_plugin.engine.speed import check_compiler, prepare_model
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import RetinaHead

# float32 convolutions in another order of addition: measured 2e-6 of the largest gradient
FLOAT32 = 1e-5


def batch(height=64, width=96, images=2):
    """Random images with two boxes each."""
    generator = torch.Generator().manual_seed(7)
    inputs = []
    for _ in range(images):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 60.0]]))
        instances.gt_classes = torch.tensor([1, 3])
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


@pytest.fixture
def detector(tiny_cfg):
    """Makes the same tiny detector each time, with other options, norms and no threshold."""
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0

    def make(norm="FrozenBN", head_norm="", freeze_at=2, **options):
        tiny_cfg.MODEL.RESNETS.NORM, tiny_cfg.MODEL.RETINANET.NORM = norm, head_norm
        tiny_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
        torch.manual_seed(0)
        model = build_model(tiny_cfg)
        prepare_model(model, **options)
        return model

    return make


def step(model, inputs):
    """Losses and gradients by name."""
    model.train()
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def detect(model, inputs):
    model.eval()
    with torch.no_grad():
        return [x["instances"] for x in model(inputs)]


def assert_same(found, expected, tolerance):
    """Each tensor within ``tolerance`` of the largest entry of the expected one."""
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.abs().max(), (name, error.item())


def assert_same_detections(found, expected, tolerance):
    """The same boxes, classes and order."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs) > 20
        torch.testing.assert_close(ours.scores, theirs.scores, atol=tolerance, rtol=0)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        torch.testing.assert_close(
            ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=100 * tolerance, rtol=0
        )


OPTIONS = {
    "channels_last": {"channels_last": True},
    "checkpointing": {"activation_checkpointing": True},
    "all": {
        "channels_last": True,
        "activation_checkpointing": True,
        "compile_parts": True,
        "compile_backend": "eager",  # the graph as PyTorch traces it, without minutes of g++
        "pad_divisor": 32,  # no more padding than without; traced for one size
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_changes_no_result(detector, options):
    """Losses, gradients, detections and the state dict are the plain model's, within 1e-5."""
    plain, model = detector(), detector(**options)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    losses, gradients = step(model, batch())
    expected_losses, expected_gradients = step(plain, batch())
    assert_same(losses, expected_losses, FLOAT32)
    assert_same(gradients, expected_gradients, FLOAT32)
    # untrained scores differ too little to be in the same order after rounding
    nn.init.normal_(plain.head.cls_score.weight, 0, 0.3, torch.Generator().manual_seed(3))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_same_detections(detect(model, batch()), detect(plain, batch()), FLOAT32)


def test_channels_last_from_the_images_to_the_head(detector):
    """Images, weights and features, which is what makes the convolutions fast."""
    model = detector(channels_last=True)
    seen = {}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():
        conv.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    step(model, batch())
    assert seen.keys() == convs.keys()
    for tensor in [*seen.values(), *(c.weight for c in convs.values())]:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    # 1 x 1 kernels and maps are contiguous in both
    assert sum(not x.is_contiguous() for x in seen.values()) > len(seen) / 2


def test_bfloat16_is_near(detector):
    """Losses within 1 percent, the gradient within 10 percent of its length (measured: 4)."""
    plain, model = detector(), detector(channels_last=True)
    expected_losses, expected = step(plain, batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = step(model, batch())
    assert_same(losses, expected_losses, 0.01)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    ours, theirs = (torch.cat([g[n].flatten() for n in expected]) for g in (gradients, expected))
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.1


class SavedBytes:
    """Bytes that the forward pass keeps for the backward pass, each storage once."""

    def __init__(self, model):
        self.storages = {}
        self.own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = tensor  # kept, so that no address comes twice
        return tensor

    def total(self):
        return sum(x.untyped_storage().nbytes() for x in self.storages.values())


def saved_bytes(model):
    model.train()
    saved = SavedBytes(model)
    with EventStorage(), torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
        losses = model(batch(128, 128))
    del losses
    return saved.total()


def test_checkpointing_keeps_less(detector):
    """Less than half of what a tiny model that is trained as a whole keeps."""
    norms = {"norm": "BN", "head_norm": "BN", "freeze_at": 0}
    kept = saved_bytes(detector(**norms, activation_checkpointing=True))
    assert kept < 0.5 * saved_bytes(detector(**norms))


def test_checkpointing_computes_twice_what_is_trained(detector):
    """Frozen blocks and evaluation once: they keep nothing."""
    model = detector(activation_checkpointing=True)
    calls = {}

    def count(name):
        calls[name] = calls.get(name, 0) + 1

    for name in ("backbone.bottom_up.res2.0", "backbone.bottom_up.res3.0", "head.cls_subnet"):
        conv = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda m, args, out, name=name: count(name))
    step(model, batch())
    # one pass a level of the head, each computed again by itself
    assert list(calls.values()) == [1, 2, 10]
    calls.clear()
    detect(model, batch())
    assert list(calls.values()) == [1, 1, 5]


@pytest.mark.parametrize("head_norm", ["BN", ""])
def test_checkpointing_leaves_running_statistics(detector, head_norm):
    """Batch norm learns from each batch once, in the head each level's norm from its level."""
    norms = {"norm": "BN", "head_norm": head_norm, "freeze_at": 0}
    plain, model = detector(**norms), detector(**norms, activation_checkpointing=True)
    for _ in range(2):
        losses, gradients = step(model, batch(128, 128))
        expected_losses, expected_gradients = step(plain, batch(128, 128))
    assert_same(losses, expected_losses, 0)
    assert_same(gradients, expected_gradients, 0)
    state, expected = model.state_dict(), plain.state_dict()
    assert any(name.endswith("running_mean") for name in expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_checkpointing_keeps_each_level_its_norm(detector):
    """Also where the levels' norms differ: evaluated with statistics of their own."""
    gradients = []
    for options in ({}, {"activation_checkpointing": True}):
        model = detector(head_norm="BN", **options)
        norms = [m for m in model.head.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 10
        for i, norm in enumerate(norms):
            norm.running_var.fill_(1 + i)
            norm.eval().train = lambda mode=True, norm=norm: norm
        gradients.append(step(model, batch())[1])
    assert_same(gradients[1], gradients[0], 0)


def test_checkpointing_leaves_random_numbers(detector):
    """Dropout in a user's head drops the same in the second computation."""
    gradients = []
    for options in ({}, {"activation_checkpointing": True}):
        model = detector()
        model.head.cls_subnet.append(nn.Dropout(0.5))
        prepare_model(model, **options)
        torch.manual_seed(5)
        gradients.append(step(model, batch())[1] | {"next": torch.rand(1)})
    assert_same(gradients[1], gradients[0], 0)


def test_a_copy_of_a_checkpointed_model(detector):
    """Computes with its own parameters, not with those of the original."""
    model = detector(activation_checkpointing=True)
    expected = step(detector(), batch())[1]
    assert_same(step(copy.deepcopy(model), batch())[1], expected, 0)
    assert all(p.grad is None for p in model.parameters())


def test_a_head_without_subnets_is_recomputed_as_a_whole():
    """A user's head of another form."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)
            self.calls = 0

        def forward(self, features):
            self.calls += 1
            return [self.conv(f) for f in features]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Conv2d(3, 16, 1), Head()

    model = Model()
    prepare_model(model, activation_checkpointing=True)
    features = [torch.rand(1, 16, s, s, requires_grad=True) for s in (4, 2)]
    sum(x.square().sum() for x in model.head(features)).backward()
    assert model.head.calls == 2 and features[0].grad is not None


def test_compiled_in_one_piece(detector):
    """Backbone and head are a graph each, without breaks; padded to one size there are no more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = detector(compile_parts=True, compile_backend=counter, pad_divisor=256)
    for size in [(192, 256), (256, 224), (64, 64)]:
        step(model, batch(*size))
        assert counter.frame_count == 2, size
    torch._dynamo.reset()


@pytest.mark.parametrize(("pad_divisor", "dynamic"), [(0, True), (128, None)])
def test_compiled_for_any_size_or_for_few(detector, monkeypatch, pad_divisor, dynamic):
    """COCO's sizes are many: without padding to few of them, code for any size from the start."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda m, **options: calls.append((m, options)))
    model = detector(compile_parts=True, pad_divisor=pad_divisor)
    options = {"backend": "inductor", "dynamic": dynamic}
    assert calls == [(model.backbone, options), (model.head, options)]


class TinyBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 4, 1)

    def forward(self, images):
        return {"p3": self.conv(images).relu()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor_makes_code_that_agrees():
    """PyTorch's own compiler, on two convolutions: compiling the tiny detector takes minutes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = TinyBackbone()
            self.head = RetinaHead(
                in_channels=16, num_levels=1, num_classes=2, num_anchors=1, num_convs=1
            )

        def forward(self, images):
            logits, deltas = self.head([self.backbone(images)["p3"]])
            return torch.cat([logits[0], deltas[0]], 1)

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    prepare_model(model, channels_last=True, compile_parts=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    results = []
    for m in (model, plain):
        out = m(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        out.square().sum().backward()
        results.append({n: p.grad for n, p in m.named_parameters()} | {"out": out.detach()})
    assert_same(*results, FLOAT32)
    torch._dynamo.reset()


def test_pad_divisor_is_padding(detector):
    """As if the images came with that padding, which is 0 after normalisation."""
    plain, model = detector(), detector(pad_divisor=128)
    nn.init.normal_(plain.head.cls_score.weight)
    model.load_state_dict(plain.state_dict())
    sizes = []
    model.backbone.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-2:]))
    inputs = batch(64, 160)
    padded = copy.deepcopy(inputs)
    for x in padded:
        image = plain.pixel_mean.expand(3, 128, 256).clone()
        image[:, :64, :160] = x["image"]
        x["image"] = image
    assert_same(step(model, inputs)[0], step(plain, padded)[0], 0)
    found, expected = detect(model, inputs), detect(plain, padded)
    assert sizes == [(128, 256)] * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.image_size == (64, 160)
        assert len(ours) and torch.isin(ours.scores, theirs.scores).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"pad_divisor": 100},
            "INPUT.PAD_DIVISOR 100 is no multiple of the backbone's 32: set it to 96, or 0",
        ),
        (
            {"pad_divisor": 8},
            "INPUT.PAD_DIVISOR 8 is no multiple of the backbone's 32: set it to 32, or 0",
        ),
        (
            {"norm": "BN", "compile_parts": True, "activation_checkpointing": True},
            "MODEL.COMPILE with MODEL.ACTIVATION_CHECKPOINTING cannot train batch norm: set "
            "MODEL.RESNETS.NORM FrozenBN or GN (and MODEL.FPN.NORM, MODEL.RETINANET.NORM), or one "
            "of the two options False",
        ),
    ],
)
def test_options_that_cannot_be(detector, options, line):
    """One line with the fix."""
    with pytest.raises(ConfigError) as error:
        detector(**options)
    assert str(error.value) == line


def test_models_of_another_form():
    """No backbone and head; a backbone that is no FPN; nothing asked, nothing needed."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    prepare_model(model)
    for option in ("channels_last", "compile_parts", "activation_checkpointing"):
        with pytest.raises(ConfigError, match="Sequential has no backbone and head: leave MODEL"):
            prepare_model(model, **{option: True})
    model.backbone, model.head = TinyBackbone(), nn.Identity()
    with pytest.raises(ConfigError, match="PAD_DIVISOR 64 is for FPN backbones, not TinyBackbone"):
        prepare_model(model, pad_divisor=64)


def test_no_compiler(monkeypatch):
    """The CPU needs a C++ compiler, a GPU Triton."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler, and there is no no-such-compiler: "):
        check_compiler("cpu")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Triton: install triton, or set MODEL.COMPILE F"):
        check_compiler("cuda")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: object())
    check_compiler("cuda")
    monkeypatch.setenv("CXX", shutil.which("true"))
    check_compiler("cpu")


def test_the_trainer_reads_the_keys(tiny_cfg, monkeypatch):
    """Each key reaches its argument; checkpointing is for a model that is trained."""
    seen = []
    monkeypatch.setattr("retina_plugin.engine.trainer.prepare_model", lambda m, **o: seen.append(o))
    Trainer.build_model(tiny_cfg)
    tiny_cfg.MODEL.CHANNELS_LAST = tiny_cfg.MODEL.COMPILE = True
    tiny_cfg.MODEL.ACTIVATION_CHECKPOINTING, tiny_cfg.INPUT.PAD_DIVISOR = True, 64
    Trainer(tiny_cfg)
    names = ("channels_last", "compile_parts", "pad_divisor")
    assert seen == [
        dict(zip(names, (False, False, 0))),
        dict(zip(names, (True, True, 64))),
        {"activation_checkpointing": True},
    ]


def test_evaluation_has_no_limits_of_training(tiny_cfg):
    """Batch norm, compiled and recomputed, cannot be trained, but it can be evaluated."""
    assert tiny_cfg.MODEL.RESNETS.NORM == "BN"
    tiny_cfg.MODEL.COMPILE = tiny_cfg.MODEL.ACTIVATION_CHECKPOINTING = True
    Trainer.build_model(tiny_cfg)
    with pytest.raises(ConfigError, match="cannot train batch norm"):
        Trainer(tiny_cfg)


def test_options_may_come_one_after_the_other(detector):
    """Checkpointing of a compiled model: the plain model's losses and gradients."""
    plain, model = detector(), detector(compile_parts=True, compile_backend="eager", pad_divisor=32)
    prepare_model(model, activation_checkpointing=True)
    losses, gradients = step(model, batch())
    expected_losses, expected_gradients = step(plain, batch())
    assert_same(losses, expected_losses, FLOAT32)
    assert_same(gradients, expected_gradients, FLOAT32)
