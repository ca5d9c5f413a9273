"""FPN P3-P7: strides, the source of P6, widths."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.modeling.pyramid import TopLevels


def cfg_with(depth, width=64, source="res5", name="build_retina_fpn_backbone", groups=1):
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.P6_SOURCE = source
    return cfg


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("source", ["res5", "p5"])
def test_levels_are_p3_to_p7_at_their_strides(depth, source):
    backbone = build_backbone(cfg_with(depth, width=64, source=source))
    features = backbone(torch.zeros(1, 3, 128, 128))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for level, feature in enumerate(features.values(), start=3):
        assert feature.shape == (1, 16, 128 // 2**level, 128 // 2**level)
    assert [s.stride for s in backbone.output_shape().values()] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize("source", ["res5", "p5"])
def test_p6_source_selects_the_input_of_p6(source):
    backbone = build_backbone(cfg_with(18, source=source)).eval()
    image = torch.randn(1, 3, 64, 64)
    features = backbone(image)
    below = features["p5"] if source == "p5" else backbone.bottom_up(image)["res5"]
    p6 = backbone.top_block.p6(below)
    assert torch.equal(features["p6"], p6)
    assert torch.equal(features["p7"], backbone.top_block.p7(p6.relu()))


@pytest.mark.parametrize("depth, groups", [(18, 1), (50, 1), (50, 32)])
def test_parameters_are_detectron2s(depth, groups):
    ours = build_backbone(cfg_with(depth, groups=groups))
    theirs = build_backbone(
        cfg_with(depth, groups=groups, name="build_retinanet_resnet_fpn_backbone")
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    image = torch.randn(1, 3, 64, 64)
    for x, y in zip(ours(image).values(), theirs(image).values()):
        assert torch.equal(x, y)


def test_resnet18_can_be_narrow():
    backbone = build_backbone(cfg_with(18, width=8))
    assert backbone.bottom_up.output_shape()["res5"].channels == 64


def test_frozen_stages_have_no_gradient():
    cfg = cfg_with(18, width=8)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    bottom_up = build_backbone(cfg).bottom_up
    trained = {n.split(".")[0] for n, p in bottom_up.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_unknown_source_raises():
    with pytest.raises(ConfigError, match="MODEL.RETINANET.P6_SOURCE.*'c5'.*res5, p5"):
        build_backbone(cfg_with(18, source="c5"))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("height", [1, 2, 3, 8])
@pytest.mark.parametrize("channels", [16, 24, 64])
def test_bfloat16_is_right_on_narrow_maps(height, width, channels):
    """P6, P7 and all gradients are those of float64, apart from rounding, also of one column.

    Memory that is freed before holds large numbers, which a convolution that reads it would show.
    """
    torch.manual_seed(0)
    levels = TopLevels(channels, channels)
    exact = copy.deepcopy(levels).double()
    x = torch.randn(2, channels, height, width)
    large = [torch.full((2**size,), 1e6) for size in range(4, 18) for _ in range(3)]
    del large
    results = []
    for model, feature in ((levels, x), (exact, x.double())):
        feature.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is levels):
            outputs = model(feature)
        sum(output.double().square().sum() for output in outputs).backward()
        results.append([*outputs, feature.grad, *(p.grad for p in model.parameters())])
    for found, expected in zip(*results):
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= 0.02 * expected.norm()
