"""The function of tensors does what the detector does."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn

from retina_plugin.deploy import DenseModel
from retina_plugin.errors import ConfigError

SIZES = [(1, 64, 96), (3, 64, 64), (2, 33, 47), (1, 1, 5), (2, 150, 70)]

MODELS = {
    "drop": [],
    "keep": ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "keep"],
    "clip": ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "clip"],
    "torchvision's anchors": ["MODEL.ANCHOR_GENERATOR.NAME", "TorchvisionAnchorGenerator"],
    "Detectron's anchors": [
        *("MODEL.ANCHOR_GENERATOR.NAME", "DetectronAnchorGenerator"),
        *("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
    ],
    "few candidates": ["MODEL.RETINANET.TOPK_CANDIDATES_TEST", "7"],
    "few detections": ["TEST.DETECTIONS_PER_IMAGE", "3"],
    "box weights": ["MODEL.RETINANET.BBOX_REG_WEIGHTS", "(10.0, 10.0, 5.0, 5.0)"],
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_detections_equal_the_detector_to_the_bit(detector, noise, name):
    """In every size and batch; what is missing has the class -1."""
    _, model = detector(*MODELS[name])
    dense = DenseModel(model).eval()
    number = 0
    for n, height, width in SIZES:
        images = noise(n, height, width)
        found = dense(images)
        assert [x.shape for x in found] == [
            (n, model.inference.max_detections, 4),
            *[(n, model.inference.max_detections)] * 2,
        ]
        for expected, boxes, scores, classes in zip(model([{"image": x} for x in images]), *found):
            expected = expected["instances"]
            k = len(expected)
            number += k
            assert torch.equal(boxes[:k], expected.pred_boxes.tensor)
            assert torch.equal(scores[:k], expected.scores)
            assert torch.equal(classes[:k], expected.pred_classes)
            assert not boxes[k:].any() and not scores[k:].any() and (classes[k:] == -1).all()
    assert number >= 15


@torch.no_grad()
def test_boxes_and_head_are_the_detectors(detector, noise):
    """In the order of the anchors, which is that of Detectron2's ``permute_to_N_HWA_K``."""
    _, model = detector()
    images = noise(2, 70, 90)
    batch = model.preprocess_image([{"image": x} for x in images])
    features = model.backbone(batch.tensor)
    features = [features[name] for name in model.head_in_features]
    logits, deltas = model.head(features)
    head = DenseModel(model, "head").eval()
    assert all(torch.equal(a, b) for a, b in zip(head(images), [*logits, *deltas], strict=True))
    levels = ["p3", "p4", "p5", "p6", "p7"]
    assert head.output_names == [f"{what}_{n}" for what in ("logits", "deltas") for n in levels]

    dense = DenseModel(model, "boxes").eval()
    boxes, scores = dense(images)
    anchors = Boxes.cat(model.anchor_generator(features)).tensor
    logits, deltas = model._transpose_dense_predictions([logits, deltas], [10, 4])
    assert torch.equal(scores, torch.cat(logits, 1).sigmoid())
    for n in range(2):
        decoded = model.box2box_transform.apply_deltas(torch.cat(deltas, 1)[n], anchors)
        assert torch.equal(boxes[n], decoded)
    assert dense.output_names == ["boxes", "scores"]


@torch.no_grad()
def test_numbers_that_are_not_finite_are_no_detections(detector, noise):
    """As in the detector."""
    _, model = detector()
    images = noise(1, 64, 64)
    before = model([{"image": images[0]}])[0]["instances"]
    model.head.bbox_pred.bias.data[:16:4] = math.nan
    model.head.bbox_pred.bias.data[17:20:2] = math.inf
    boxes, scores, _ = DenseModel(model).eval()(images)
    expected = model([{"image": images[0]}])[0]["instances"]
    assert 0 < len(expected) and not torch.equal(expected.scores, before.scores)
    assert torch.equal(boxes[0, : len(expected)], expected.pred_boxes.tensor)
    assert (scores[0] > 0).sum() == len(expected)


def test_images_are_padded_to_a_square_where_the_backbone_asks(detector, noise, monkeypatch):
    """Plain vision transformers do."""
    _, model = detector()
    square = property(lambda self: {"square_size": 128})
    monkeypatch.setattr(type(model.backbone), "padding_constraints", square)
    images = noise(1, 60, 100)
    dense = DenseModel(model, "head").eval()
    assert dense(images)[0].shape[-2:] == (16, 16)
    padded = model.preprocess_image([{"image": images[0]}]).tensor
    assert torch.equal(dense._padded((images - model.pixel_mean) / model.pixel_std), padded)


def test_unknown_parts_are_refused(detector):
    """One line each, with what can be exported instead."""
    _, model = detector()
    with pytest.raises(ConfigError, match=r"not Linear: set MODEL.META_ARCHITECTURE"):
        DenseModel(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="did you mean 'boxes'"):
        DenseModel(model, "box")
    generator = type("Mine", (type(model.anchor_generator),), {})
    model.anchor_generator.__class__ = generator
    with pytest.raises(ConfigError, match=r"the anchors of Mine .*stage head"):
        DenseModel(model)
    assert DenseModel(model, "head").stage == "head"
    _, model = detector("TEST.MERGE", "wbf")
    with pytest.raises(ConfigError, match=r"TEST.MERGE nms, or export the stage boxes"):
        DenseModel(model)
    assert DenseModel(model, "boxes").stage == "boxes"
    model.inference.box2box_transform = object()
    with pytest.raises(ConfigError, match=r"boxes that object decodes"):
        DenseModel(model, "boxes")
    model.inference = lambda *args: []
    with pytest.raises(ConfigError, match=r"the inference function cannot be exported"):
        DenseModel(model, "boxes")
