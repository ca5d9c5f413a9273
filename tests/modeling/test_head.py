"""The head: structure, initialisation, and Detectron2's parameter names."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import RETINANET_HEAD_REGISTRY, RetinaHead, prior_bias

SHAPES = [ShapeSpec(channels=16, stride=8), ShapeSpec(channels=16, stride=16)]


def cfg_with(**retinanet):
    cfg = add_retina_config(get_cfg())
    for key, value in retinanet.items():
        cfg.MODEL.RETINANET[key] = value
    return cfg


def test_prior_bias_makes_sigmoid_give_pi():
    for pi in (0.001, 0.01, 0.3):
        assert math.isclose(torch.sigmoid(torch.tensor(prior_bias(pi))).item(), pi, rel_tol=1e-5)
    assert prior_bias(0.5) == 0.0


@pytest.mark.parametrize("pi", [0.0, 1.0, -0.1])
def test_prior_out_of_range_raises(pi):
    with pytest.raises(ConfigError, match="PRIOR_PROB"):
        prior_bias(pi)


def test_initialisation_is_section_4_1():
    torch.manual_seed(0)
    head = RetinaHead(in_channels=64, num_levels=2, num_classes=80, num_anchors=9)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 10
    for conv in convs:
        assert abs(conv.weight.std().item() - 0.01) < 5e-4 and abs(conv.weight.mean()) < 5e-4
        if conv is not head.cls_score:
            assert not conv.bias.any()
    assert torch.equal(head.cls_score.bias, torch.full((720,), -math.log((1 - 0.01) / 0.01)))


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("num_convs", [1, 4])
def test_parameters_and_outputs_are_detectron2s(norm, num_convs):
    if norm == "GN":  # Detectron2's has 32 groups
        shapes = [ShapeSpec(channels=32, stride=s.stride) for s in SHAPES]
    else:
        shapes = SHAPES
    cfg = cfg_with(NUM_CLASSES=3, NUM_CONVS=num_convs, NORM=norm)
    ours, theirs = RETINANET_HEAD_REGISTRY.build(cfg, shapes), RetinaNetHead(cfg, shapes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = [torch.randn(2, shapes[0].channels, s, s + 1) for s in (8, 4)]
    for own, their in zip(ours(features), theirs(features)):
        for x, y in zip(own, their):
            assert torch.equal(x, y)


def test_levels_share_parameters_and_subnets_do_not():
    head = RETINANET_HEAD_REGISTRY.build(cfg_with(NUM_CLASSES=3, NUM_CONVS=2), SHAPES)
    logits, deltas = head([torch.ones(1, 16, 8, 8), torch.ones(1, 16, 8, 8)])
    assert torch.equal(logits[0], logits[1]) and torch.equal(deltas[0], deltas[1])
    cls = {id(p) for p in head.cls_subnet.parameters()}
    assert not cls & {id(p) for p in head.bbox_subnet.parameters()}


def test_levels_with_different_numbers_of_anchors_raise():
    cfg = cfg_with()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64, 80]]
    with pytest.raises(ConfigError, match=r"ANCHOR_GENERATOR gives \[3, 6\]"):
        RETINANET_HEAD_REGISTRY.build(cfg, SHAPES)


def test_wrong_number_of_levels_raises():
    head = RETINANET_HEAD_REGISTRY.build(cfg_with(), SHAPES)
    with pytest.raises(ValueError, match="2 levels, not 1"):
        head([torch.zeros(1, 16, 8, 8)])
