"""A tiny trained-shaped model whose scores are spread, so that it finds something everywhere."""

import pytest
import torch
from detectron2.modeling import build_model

from retina_plugin.predict import RetinaPredictor


@pytest.fixture
def weights(tiny_cfg, tmp_path):
    """A complete checkpoint of ``tiny_cfg``'s model with random weights and class names."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    model.head.cls_score.bias.data.fill_(-2.0)
    path = tmp_path / "weights.pth"
    names = [f"дзета {k}" for k in range(10)]
    torch.save({"model": model.state_dict(), "class_names": names}, path)
    return path


@pytest.fixture
def load(tiny_cfg, weights):
    """``RetinaPredictor.load`` of that model."""
    return lambda **options: RetinaPredictor.load(tiny_cfg, weights, **options)
