"""Anchor samplers."""

import pytest
import torch
from detectron2.config import get_cfg

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses import DenseTargets
from retina_plugin.modeling import ANCHOR_SAMPLER_REGISTRY


def test_all_anchors_leaves_the_targets_alone():
    some = torch.tensor([1, 2])
    targets = DenseTargets(1, some * 0, some, some, torch.zeros(2, 4), some * 0, some + 2)
    sampler = ANCHOR_SAMPLER_REGISTRY.build(add_retina_config(get_cfg()))
    assert sampler(targets, []) is targets


def test_unknown_sampler_lists_the_known_ones():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.SAMPLER = "Random"
    with pytest.raises(ConfigError, match="SAMPLER.*'Random'.*AllAnchors"):
        ANCHOR_SAMPLER_REGISTRY.build(cfg)
