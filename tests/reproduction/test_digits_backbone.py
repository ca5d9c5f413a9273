"""The backbone that rows of the mini scale start from."""

import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from reproduction import digits_backbone
from retina_plugin.data import digits
from retina_plugin.engine import check_weights, setup_cfg
from retina_plugin.errors import ConfigError


@pytest.fixture
def mini_cfg(repo, tiny_digits):
    return setup_cfg(str(repo / "reproduction" / "mini.yaml"), ["MODEL.DEVICE", "cpu"])


def test_it_learns_and_the_detector_loads_all_of_it(mini_cfg, tmp_path, caplog):
    """The few crops there are; every parameter and statistic of the backbone, nothing else."""
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


def test_weights_are_made_once(mini_cfg, monkeypatch):
    """By the check before a training; the name in the cache follows from what they are made of."""
    made = []

    def pretrain_backbone(path):
        made.append(path)
        path.write_bytes(b"weights")

    monkeypatch.setattr(digits_backbone, "pretrain_backbone", pretrain_backbone)
    check_weights(mini_cfg)
    check_weights(mini_cfg)
    monkeypatch.setattr(digits_backbone, "_ITERATIONS", 7)
    check_weights(mini_cfg)
    assert len(made) == len(set(made)) == 2
    assert {path.parent for path in made} == {digits.dataset_root().parent}
    for path in made:
        path.unlink()


def test_there_is_one_file_only(mini_cfg):
    """A misspelt name is said with the one there is."""
    mini_cfg.MODEL.WEIGHTS = "digits://head.pkl"
    with pytest.raises(ConfigError, match=r"there is digits://backbone.pkl only"):
        check_weights(mini_cfg)
