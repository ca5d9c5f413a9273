"""Speed and memory options give the plain detector's names, losses, gradients and detections."""

import copy
import shutil

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from retina_plugin.engine import Trainer, report
from retina_plugin.engine.performance import (
    Autocast,
    inference_dtype,
    prepare_model,
    training_dtype,
)
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import RetinaHead

# Convolutions that add in another order differ by 2e-6 of the largest gradient (measured).
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
    """``detector(**options)`` makes the same tiny detector each time; it has no score threshold."""
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
        "compile_backend": "eager",  # runs the traced graph; compiling it takes minutes
    },
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if name == "all" else [])
        for name, options in OPTIONS.items()
    ],
)
def test_options_change_no_result(detector, options):
    """State dict, losses, gradients and detections equal the plain model's, within 1e-5."""
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
    # The scores of an untrained model are so close that rounding would change their order.
    nn.init.normal_(plain.head.cls_score.weight, 0, 0.3, torch.Generator().manual_seed(3))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_same_detections(detect(model, batch()), detect(plain, batch()), FLOAT32)


def test_channels_last_reaches_every_convolution(detector):
    """Its input and its weights, which is what makes it fast."""
    model = detector(channels_last=True)
    seen = {}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():
        conv.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    step(model, batch())
    assert seen.keys() == convs.keys()
    for tensor in [*seen.values(), *(c.weight for c in convs.values())]:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    # 1 x 1 kernels and maps are contiguous in both formats.
    assert sum(not x.is_contiguous() for x in seen.values()) > len(seen) / 2


def test_bfloat16_is_close_to_float32(detector):
    """Losses within 1 percent, the gradient within 10 percent of its norm (measured: 4)."""
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
    """Counts the bytes that the forward pass keeps for the backward pass, each storage once."""

    def __init__(self, model):
        self.storages = {}
        self.own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = tensor  # keeps the address in use
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


def test_checkpointing_saves_memory(detector):
    """It keeps less than half as many bytes, if all of the model is trained."""
    norms = {"norm": "BN", "head_norm": "BN", "freeze_at": 0}
    kept = saved_bytes(detector(**norms, activation_checkpointing=True))
    assert kept < 0.5 * saved_bytes(detector(**norms))


def test_checkpointing_recomputes_only_trained_parts(detector):
    """Frozen blocks, and a model that is evaluated, are computed once."""
    model = detector(activation_checkpointing=True)
    calls = {}

    def count(name):
        calls[name] = calls.get(name, 0) + 1

    for name in ("backbone.bottom_up.res2.0", "backbone.bottom_up.res3.0", "head.cls_subnet"):
        conv = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda m, args, out, name=name: count(name))
    step(model, batch())
    # the head runs once on each of five levels
    assert list(calls.values()) == [1, 2, 10]
    calls.clear()
    detect(model, batch())
    assert list(calls.values()) == [1, 1, 5]


@pytest.mark.parametrize("head_norm", ["BN", ""])
def test_checkpointing_updates_running_statistics_once(detector, head_norm):
    """For each batch, and each level's norm of the head from its own level."""
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


def test_checkpointing_recomputes_a_level_with_its_norm(detector):
    """The norms of the levels are in eval mode here, with different statistics."""
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


def test_checkpointing_repeats_random_numbers(detector):
    """Dropout drops the same activations in both computations."""
    gradients = []
    for options in ({}, {"activation_checkpointing": True}):
        model = detector()
        model.head.cls_subnet.append(nn.Dropout(0.5))
        prepare_model(model, **options)
        torch.manual_seed(5)
        gradients.append(step(model, batch())[1] | {"next": torch.rand(1)})
    assert_same(gradients[1], gradients[0], 0)


def test_copy_of_a_checkpointed_model(detector):
    """It computes with its own parameters, not with those of the original."""
    model = detector(activation_checkpointing=True)
    expected = step(detector(), batch())[1]
    assert_same(step(copy.deepcopy(model), batch())[1], expected, 0)
    assert all(p.grad is None for p in model.parameters())


def test_head_without_subnets_is_recomputed_as_a_whole():
    """Such as a user may write."""

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


def test_compiled_once_for_all_sizes(detector):
    """Backbone and head are one graph each, without breaks, for images of any size.

    PyTorch itself compiles again where a convolution is small enough for another algorithm, so the
    sizes here are of one magnitude.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = detector(compile_parts=True, compile_backend=counter)
    for size in [(320, 448), (352, 416), (448, 320)]:
        step(model, batch(*size, images=1))
        assert counter.frame_count == 2, size
    torch._dynamo.reset()


class TinyBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 4, 1)

    def forward(self, images):
        return {"p3": self.conv(images).relu()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_code_agrees():
    """Of PyTorch's own compiler, for two convolutions. The tiny detector would take minutes."""

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


def test_compiled_and_checkpointed_batch_norm_raises(detector):
    """If it is trained."""
    with pytest.raises(ConfigError) as error:
        detector(norm="BN", compile_parts=True, activation_checkpointing=True)
    assert str(error.value) == (
        "MODEL.COMPILE with MODEL.ACTIVATION_CHECKPOINTING cannot train batch norm: set "
        "MODEL.RESNETS.NORM FrozenBN or GN, MODEL.TIMM.NORM FrozenBN (and MODEL.FPN.NORM, "
        "MODEL.RETINANET.NORM), or one of the two options False"
    )


def test_model_without_backbone_and_head_raises():
    """Unless no option is on."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    prepare_model(model)
    for option in ("channels_last", "compile_parts", "activation_checkpointing"):
        with pytest.raises(ConfigError, match="Sequential has no backbone and head: leave MODEL"):
            prepare_model(model, **{option: True})


def test_trainer_reads_the_keys(tiny_cfg, monkeypatch):
    """Each key reaches its argument. Checkpointing is for training only."""
    seen = []
    monkeypatch.setattr("retina_plugin.engine.trainer.prepare_model", lambda m, **o: seen.append(o))
    Trainer.build_model(tiny_cfg)
    tiny_cfg.MODEL.CHANNELS_LAST = tiny_cfg.MODEL.COMPILE = True
    tiny_cfg.MODEL.ACTIVATION_CHECKPOINTING = True
    Trainer(tiny_cfg)
    assert seen == [
        {"channels_last": False, "compile_parts": False},
        {"channels_last": True, "compile_parts": True},
        {"activation_checkpointing": True},
    ]


def test_compiled_and_checkpointed_batch_norm_can_be_evaluated(tiny_cfg):
    """The same keys raise in a training."""
    assert tiny_cfg.MODEL.RESNETS.NORM == "BN"
    tiny_cfg.MODEL.COMPILE = tiny_cfg.MODEL.ACTIVATION_CHECKPOINTING = True
    Trainer.build_model(tiny_cfg)
    with pytest.raises(ConfigError, match="cannot train batch norm"):
        Trainer(tiny_cfg)


def test_second_call_adds_options(detector):
    """Checkpointing a compiled model keeps its losses and gradients."""
    plain, model = detector(), detector(compile_parts=True, compile_backend="eager")
    prepare_model(model, activation_checkpointing=True)
    losses, gradients = step(model, batch())
    expected_losses, expected_gradients = step(plain, batch())
    assert_same(losses, expected_losses, FLOAT32)
    assert_same(gradients, expected_gradients, FLOAT32)


class Probe(nn.Module):
    """Records the type of a convolution's output, and the training mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.seen = []

    def forward(self, inputs):
        self.seen.append((self.conv(torch.rand(1, 1, 2, 2)).dtype, self.training))
        return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_ends_with_the_forward_pass(dtype):
    """The training mode of the wrapper is the model's."""
    probe = Probe()
    model = Autocast(probe, "cpu", dtype)
    assert model([1]) == [1] and model.training
    assert model.eval()([2]) == [2] and not Autocast(probe, "cpu", dtype).training
    assert probe.seen == [(dtype, True), (dtype, False)]
    assert probe.conv(torch.rand(1, 1, 2, 2)).dtype == torch.float32


def test_float32_keeps_a_callers_autocast():
    """It does not switch autocast off."""
    probe = Probe().eval()
    with torch.autocast("cpu", torch.bfloat16):
        Autocast(probe, "cpu", torch.float32)([1])
    assert probe.seen == [(torch.bfloat16, False)]


@pytest.fixture
def evaluated(tiny_cfg, monkeypatch):
    """``evaluated(precision)``: the types in model and evaluator of ``Trainer.test``.

    The picture of detections is drawn too.
    """

    class Evaluator(DatasetEvaluator):
        def process(self, inputs, outputs):
            # float32 whatever TEST.PRECISION is, because autocast has ended
            seen["evaluator"] = (torch.rand(2, 2) @ torch.rand(2, 2)).dtype
            seen["detections"] = outputs[0]["instances"]

        def evaluate(self):
            return {}

    seen = {}
    monkeypatch.setattr(Trainer, "build_evaluator", classmethod(lambda cls, cfg, name: Evaluator()))

    def run(precision, channels_last=False):
        tiny_cfg.TEST.PRECISION, tiny_cfg.MODEL.CHANNELS_LAST = precision, channels_last
        tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        torch.manual_seed(0)
        model = Trainer.build_model(tiny_cfg)
        nn.init.normal_(model.head.cls_score.weight, 0, 0.05)
        dtypes = seen["model"] = []
        model.head.cls_score.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
        Trainer.test(tiny_cfg, model)
        images = len(dtypes)
        report.draw_detections(tiny_cfg, model, tiny_cfg.OUTPUT_DIR + "sheet.png", num_images=1)
        assert len(dtypes) > images > 0 and model.training
        return dict(seen)

    return run


def test_evaluation_in_bfloat16(evaluated):
    """Boxes stay float32, and scores are close."""
    plain, found = evaluated("float32"), evaluated("bfloat16", channels_last=True)
    assert set(plain["model"]) == {torch.float32} and set(found["model"]) == {torch.bfloat16}
    assert plain["evaluator"] == found["evaluator"] == torch.float32
    ours, theirs = found["detections"], plain["detections"]
    assert ours.pred_boxes.tensor.dtype == torch.float32
    number = min(len(ours), len(theirs))
    assert number > 20
    # Scores decrease; which of two equal ones comes first may differ.
    torch.testing.assert_close(
        ours.scores[:number].float(), theirs.scores[:number], atol=0.01, rtol=0.05
    )


def test_types_of_the_precisions(tiny_cfg):
    """float32 and no autocast by default."""
    assert inference_dtype(tiny_cfg) == torch.float32
    assert training_dtype(tiny_cfg) is None
    tiny_cfg.SOLVER.AMP.ENABLED = True
    assert training_dtype(tiny_cfg) == torch.float16
    tiny_cfg.SOLVER.AMP.PRECISION = tiny_cfg.TEST.PRECISION = "bfloat16"
    assert training_dtype(tiny_cfg) == inference_dtype(tiny_cfg) == torch.bfloat16
