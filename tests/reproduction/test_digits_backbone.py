"""The pretrained backbone of the mini scale."""

import dataclasses
import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from reproduction import digits_backbone
from retina_plugin.cache import cache_root
from retina_plugin.data import digits
from retina_plugin.engine import check_weights, setup_cfg
from retina_plugin.errors import ConfigError


@pytest.fixture
def mini_cfg(repo, tiny_digits, tiny_sparse):
    return setup_cfg(str(repo / "reproduction" / "mini.yaml"), ["MODEL.DEVICE", "cpu"])


def test_pretraining_learns_and_the_detector_loads_every_weight(mini_cfg, tmp_path, caplog):
    """It has the backbone's parameters and statistics and nothing else; random state stays."""
    path = tmp_path / "weights" / "backbone.pkl"
    state = torch.get_rng_state()
    assert digits_backbone.pretrain_backbone(path, iterations=15) < 1.5  # chance is ln 10 = 2.3
    assert torch.equal(torch.get_rng_state(), state)
    weights = pickle.loads(path.read_bytes())["model"]
    model = build_model(mini_cfg)
    expected = {f"backbone.bottom_up.{k}" for k in model.backbone.bottom_up.state_dict()}
    assert weights.keys() == expected
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(str(path))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], torch.as_tensor(v)) for k, v in weights.items())
    assert "shape" not in caplog.text


def test_weights_are_made_once_and_named_after_the_images(mini_cfg, monkeypatch):
    made = []

    def pretrain_backbone(path):
        made.append(path)
        path.write_bytes(b"weights")

    monkeypatch.setattr(digits_backbone, "pretrain_backbone", pretrain_backbone)
    check_weights(mini_cfg)
    check_weights(mini_cfg)
    assert len(made) == 1
    monkeypatch.setattr(digits, "SPEC", dataclasses.replace(digits.SPEC, seed=1))
    check_weights(mini_cfg)
    assert len(made) == len(set(made)) == 2
    assert {path.parent for path in made} == {cache_root()}
    for path in made:
        path.unlink()


def test_unknown_file_raises(mini_cfg):
    mini_cfg.MODEL.WEIGHTS = "digits://head.pkl"
    with pytest.raises(ConfigError, match=r"the only file is digits://backbone.pkl"):
        check_weights(mini_cfg)
