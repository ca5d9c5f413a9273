"""FPN P3-P7 on models of timm: three families, against timm's own features."""

import itertools
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from retina_plugin import add_retina_config
from retina_plugin.engine.performance import prepare_model
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import TimmFeatures
from retina_plugin.modeling.timm_models import feature_index

timm = pytest.importorskip("timm")

# A ResNet (stem of stride 2), a mobilenet (features not at the ends of its stages) and a windowed
# transformer (NHWC features, made for images of 224 px, no feature of stride 2).
NAMES = ("resnet18", "mobilenetv3_small_050", "swin_s3_tiny_224")
LEVELS = ["res3", "res4", "res5"]

every_model = pytest.mark.parametrize("name", NAMES)


def cfg_with(name, norm="BN", freeze_at=0, source="res5"):
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_retina_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = name, norm
    cfg.MODEL.FPN.IN_FEATURES = LEVELS
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.RETINANET.P6_SOURCE = source
    cfg.MODEL.RETINANET.LOSS_BACKEND = "eager"
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
    return cfg


@every_model
@pytest.mark.parametrize("source", ["res5", "p5"])
def test_levels_are_p3_to_p7_at_their_strides(name, source):
    backbone = build_backbone(cfg_with(name, source=source))
    features = backbone(torch.zeros(1, 3, 128, 256))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for level, feature in enumerate(features.values(), start=3):
        assert feature.shape == (1, 16, 128 // 2**level, 256 // 2**level)
    assert [s.stride for s in backbone.output_shape().values()] == [8, 16, 32, 64, 128]
    assert backbone.size_divisibility == 32
    p6 = backbone.top_block.p6
    wide = backbone.bottom_up.output_shape()["res5"].channels
    assert p6.in_channels == (wide if source == "res5" else 16)


@every_model
def test_features_are_timms_to_the_bit(name):
    torch.manual_seed(0)
    ours = TimmFeatures(name, LEVELS, norm="BN").eval()
    options = {"strict_img_size": False} if "swin" in name else {}
    torch.manual_seed(0)  # so the weights are those that timm draws
    theirs = timm.create_model(name, features_only=True, **options).eval()
    by_stride = dict(zip(theirs.feature_info.reduction(), theirs.feature_info.channels()))
    image = torch.randn(2, 3, 96, 160)
    expected = dict(zip(theirs.feature_info.reduction(), theirs(image)))
    found = ours(image)
    assert list(found) == LEVELS
    for level, stride in zip(LEVELS, (8, 16, 32)):
        feature = expected[stride]
        if "swin" in name:
            feature = feature.permute(0, 3, 1, 2)
        assert torch.equal(found[level], feature)
        shape = ours.output_shape()[level]
        assert (shape.channels, shape.stride) == (by_stride[stride], stride)
        assert feature.shape == (2, by_stride[stride], 96 // stride, 160 // stride)


def inputs():
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in ((96, 128), (70, 90)):  # batches are padded
        truth = Instances(size, gt_boxes=Boxes(torch.tensor([[4.0, 4.0, 60.0, 66.0]])))
        truth.gt_classes = torch.tensor([1])
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "instances": truth})
    return found


@every_model
def test_detector_trains_and_detects(name):
    cfg = cfg_with(name)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    with EventStorage():
        losses = model(inputs())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable.values())
    optimizer.step()
    changed = {n for n, p in trainable.items() if not torch.equal(p, before[n])}
    assert sum(n.startswith("backbone.bottom_up.") for n in changed) > 40
    model.eval()
    for output, record in zip(model(inputs()), inputs()):
        instances = output["instances"]
        assert instances.image_size == tuple(record["image"].shape[1:])
        assert torch.isfinite(instances.pred_boxes.tensor).all()


@pytest.mark.parametrize(
    ("name", "freeze_at", "first_trained"),
    [
        ("resnet18", 0, "conv1.weight"),
        ("resnet18", 1, "layer1.0.conv1.weight"),
        ("resnet18", 2, "layer2.0.conv1.weight"),
        ("resnet18", 5, None),
        ("swin_s3_tiny_224", 2, "layers_1.downsample.norm.weight"),
        ("mobilenetv3_small_050", 2, "blocks.1.0.conv_pw.weight"),
    ],
)
def test_freeze_at_freezes_what_a_feature_is_made_with(name, freeze_at, first_trained):
    features = TimmFeatures(name, LEVELS, norm="BN", freeze_at=freeze_at).features
    names = [n for n, _ in features.named_parameters()]
    trained = [n for n, p in features.named_parameters() if p.requires_grad]
    assert trained == ([] if first_trained is None else names[names.index(first_trained) :])
    moving = {n.rpartition(".")[0] for n, _ in features.named_buffers() if "tracked" in n}
    assert not any(f"{norm}.weight" in names and f"{norm}.weight" not in trained for norm in moving)


def test_frozen_batch_norm_keeps_its_statistics_and_gives_timms_features():
    torch.manual_seed(0)
    ours = TimmFeatures("resnet18", LEVELS)  # FrozenBN
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert not any("bn" in n for n in names) and "features.layer1.0.conv1.weight" in names
    plain = TimmFeatures("resnet18", LEVELS, norm="BN").eval()
    found = plain.load_state_dict(ours.state_dict(), strict=False)
    assert all(n.endswith("num_batches_tracked") for n in found.missing_keys)
    assert not found.unexpected_keys
    before = {n: b.clone() for n, b in ours.named_buffers()}
    image = torch.randn(1, 3, 64, 96)
    for x, y in zip(ours.train()(image).values(), plain(image).values()):
        torch.testing.assert_close(x, y)
    assert all(torch.equal(b, before[n]) for n, b in ours.named_buffers())


def test_parameters_without_effect_are_frozen():
    """DistributedDataParallel waits for every trainable parameter's gradient."""
    features = TimmFeatures("hrnet_w18_small", LEVELS, norm="BN").train()
    sum(x.sum() for x in features(torch.randn(1, 3, 64, 64)).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in features.parameters())
    assert not all(p.requires_grad for p in features.parameters())


@every_model
def test_gradients_are_the_same_with_activation_checkpointing(name):
    torch.manual_seed(0)
    model = build_model(cfg_with(name))
    blocks = model.backbone.bottom_up.blocks()
    assert len(blocks) >= 4
    inner = next(
        m for m in blocks[1].modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    )
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    gradients, counts = [], []
    for checkpointed in (False, True):
        if checkpointed:
            prepare_model(model, activation_checkpointing=True)
        model.zero_grad()
        calls.clear()
        torch.manual_seed(1)  # drop path
        features = model.backbone(torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96))
        sum(x.square().mean() for x in features.values()).backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
        counts.append(len(calls))
    for x, y in zip(*gradients):
        assert torch.equal(x, y)
    assert counts == [1, 2]  # computed again in the backward pass


@pytest.mark.slow
def test_channels_last_and_compiled_give_the_same_features():
    torch.manual_seed(0)
    model = build_model(cfg_with("resnet18")).eval()
    image = torch.randn(1, 3, 64, 96)
    expected = model.backbone(image)
    prepare_model(model, channels_last=True, compile_parts=True, compile_backend="eager")
    for x, y in zip(model.backbone(image).values(), expected.values()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def refusal(name="resnet18", levels=LEVELS, **options):
    with pytest.raises(ConfigError) as error:
        TimmFeatures(name, levels, **options)
    return str(error.value)


def test_unknown_names_raise_with_the_nearest():
    assert "'resnet19' (did you mean 'resnet" in refusal("resnet19")
    assert "no weights 'resnet18.tv' (did you mean 'resnet18.tv_in1k'" in refusal("resnet18.tv")
    assert "MODEL.TIMM.NAME: is empty" in refusal("")
    assert "'hf-hub:timm/x'" in refusal("hf-hub:timm/x")  # would fetch code and config from there


def test_models_without_the_strides_or_of_one_size_raise():
    assert "feature of stride 8" in refusal("vit_tiny_patch16_224")
    assert "images of 224 x 224 pixels only" in refusal("efficientformer_l1")
    assert "does not cover the image" in refusal("inception_v3")


def test_freeze_at_without_such_a_feature_raises_and_lists_those_that_work():
    message = refusal("convnext_atto", freeze_at=1)
    assert message.startswith("MODEL.BACKBONE.FREEZE_AT: 1 freezes")
    assert message.endswith("set it to one of 0, 2, 3, 4, 5")


def test_bad_keys_raise():
    cfg = cfg_with("resnet18")
    for key, value, match in [
        ("MODEL.FPN.IN_FEATURES", [], "IN_FEATURES: is empty"),
        ("MODEL.FPN.IN_FEATURES", ["c3"], "IN_FEATURES: unknown 'c3'.*res3"),
        ("MODEL.RETINANET.P6_SOURCE", "c5", "P6_SOURCE: unknown 'c5'"),
        ("MODEL.TIMM.NORM", "GN", "NORM: unknown 'GN'.*FrozenBN"),
    ]:
        bad = cfg.clone()
        bad.merge_from_list([key, value])
        with pytest.raises(ConfigError, match=match):
            build_backbone(bad)


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm")

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(sys, "meta_path", list(itertools.chain([NotInstalled()], sys.meta_path)))
    assert "retina_plugin[timm]" in refusal()


def test_of_several_features_with_a_stride_it_is_the_last():
    assert feature_index("csatv2", [8, 8, 16, 32, 64], 8) == 1
