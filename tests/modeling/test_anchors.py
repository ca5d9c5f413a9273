"""Anchors like torchvision's, against torchvision."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

STRIDES = (8, 16, 32, 64, 128)
SIZES = [[32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406], [512, 645, 812]]
RATIOS = [0.5, 1.0, 2.0]


def ours(features):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "TorchvisionAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = SIZES
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [RATIOS]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in STRIDES])
    assert generator.num_cell_anchors == [9] * 5
    return generator(features)


def features_of(height, width):
    return [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]


@pytest.mark.parametrize("size", [(32, 32), (320, 480), (800, 1344), (608, 96), (1024, 1024)])
def test_torchvision_anchors_are_torchvisions_to_the_bit(size):
    """Whether a level's size was rounded up or not; only the order in a location differs."""
    features = features_of(*size)
    theirs = AnchorGenerator(tuple(map(tuple, SIZES)), (tuple(RATIOS),) * 5)
    (expected,) = theirs(ImageList(torch.empty(1, 3, *size), [size]), features)
    lengths = [math.prod(x.shape[2:]) * 9 for x in features]
    for got, level in zip(ours(features), expected.split(lengths)):
        by_size = level.unflatten(0, (-1, 3, 3)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(got.tensor, by_size)


def test_distance_of_locations_is_that_of_the_rounded_level():
    """320 / 5 = 64, but 480 / 8 = 60 px on P6."""
    p6 = ours(features_of(320, 480))[3].tensor.view(5, 8, 9, 4)
    assert (p6[1, 0] - p6[0, 0]).unique().tolist() == [0, 64]
    assert (p6[0, 1] - p6[0, 0]).unique().tolist() == [0, 60]
