"""Inference against loops: threshold, top-k, NMS by class, the most detections; nonsense logits."""

import math

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from hypothesis import strategies as st

from retina_plugin.modeling.box_regression import BoxTransform
from retina_plugin.modeling.inference import DenseInference
from tests.fuzz.counting import fuzz
from tests.fuzz.strategies import THRESHOLDS, generators, pick, random_boxes

SIZE = (64, 64)
CODER = BoxTransform((1.0, 1.0, 1.0, 1.0))
# On a grid, so that scores are often equal; beyond 17 the sigmoid is 1 in float32.
LOGITS = [-40.0, -9.0, -3.0, -2.944439, -1.0, 0.0, 0.5, 2.0, 17.0, 40.0, 90.0]
NONSENSE = [math.nan, math.inf, -math.inf, 3e38, -3e38]
DELTAS = [0.0, -0.7, 0.3, 2.0, -3.0, 1e5]


@st.composite
def outputs(draw, logits=LOGITS, deltas=(0.0,)):
    """Anchors, logits and deltas of one image, and settings."""
    generator = draw(generators())
    K, A = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    levels = []
    for _ in range(draw(st.integers(1, 3))):
        h, w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        anchors = random_boxes(generator, A * h * w, -4, 70)
        x = pick(generator, logits, 1, A * K, h, w)
        if draw(st.booleans()):
            x = x.contiguous(memory_format=torch.channels_last)
        levels.append((anchors, x, pick(generator, deltas, 1, A * 4, h, w)))
    settings = {
        "score_thresh": draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9999999, 1.0])),
        "topk_candidates": draw(st.sampled_from([1, 2, 5, 1000])),
        "nms_thresh": draw(THRESHOLDS),
        "max_detections": draw(st.sampled_from([1, 3, 100])),
    }
    return K, levels, settings


def detect(K, levels, settings):
    inference = DenseInference(num_classes=K, box2box_transform=CODER, **settings)
    anchors, logits, deltas = zip(*levels)
    (found,) = inference([Boxes(a) for a in anchors], logits, deltas, [SIZE])
    return found


def naive(K, levels, score_thresh, topk_candidates, nms_thresh, max_detections):
    """(score, class, box) of each detection; of equal scores the first anchor, then class."""
    candidates = []
    for anchors, x, _ in levels:
        score_AK = x[0].reshape(-1, K, x.shape[2] * x.shape[3]).permute(2, 0, 1).reshape(-1, K)
        score_AK = score_AK.sigmoid()
        above = [
            (float(score), a * K + k, k, tuple(anchors[a].tolist()))
            for a, row in enumerate(score_AK)
            for k, score in enumerate(row)
            if float(score) > float(np.float32(score_thresh))
        ]
        candidates += sorted(above, key=lambda c: (-c[0], c[1]))[:topk_candidates]
    kept = []
    for score, _, k, box in sorted(candidates, key=lambda c: -c[0]):
        if all(k != other or iou(box, b) <= nms_thresh for _, other, b in kept):
            kept.append((score, k, box))
    return kept[:max_detections]


def iou(a, b):
    """In float32, as torchvision's NMS computes it; NaN of two boxes without area is no overlap."""
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    both = width * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return float(np.float32(both) / np.float32(area - both)) if area > both else 0.0


@fuzz(25, output=outputs())
def test_detections_are_those_of_a_loop(output):
    """On integer boxes, so that every IoU is exact; with ties of scores and of IoUs."""
    K, levels, settings = output
    found = detect(K, levels, settings)
    expected = naive(K, levels, **settings)
    assert found.scores.tolist() == [score for score, _, _ in expected]
    assert found.pred_classes.tolist() == [k for _, k, _ in expected]
    assert [tuple(box) for box in found.pred_boxes.tensor.tolist()] == [b for *_, b in expected]


@fuzz(25, output=outputs(LOGITS + NONSENSE, DELTAS * 3 + NONSENSE))
def test_nonsense_is_never_a_detection(output):
    """Whatever the network gives: after postprocessing all numbers are finite, boxes inside."""
    K, levels, settings = output
    found = detector_postprocess(detect(K, levels, settings), *SIZE)
    assert len(found) <= settings["max_detections"]
    assert found.scores.isfinite().all() and found.pred_boxes.tensor.isfinite().all()
    assert (found.scores > settings["score_thresh"]).all() and (found.scores <= 1).all()
    assert (found.scores.diff() <= 0).all()
    box = found.pred_boxes.tensor
    assert (box >= 0).all() and (box <= 64).all() and (box[:, :2] < box[:, 2:]).all()


@fuzz(10, output=outputs(LOGITS + NONSENSE), place=st.floats(0, 1))
def test_a_nan_hides_no_other_detection(output, place):
    """The detections are those of the same logits with -inf in the place of NaN."""
    K, levels, settings = output
    for _, x, _ in levels:
        x[0, :, 0, 0][int(place * (x.shape[1] - 1))] = math.nan
    without = [(a, x.nan_to_num(-math.inf, math.inf, -math.inf), d) for a, x, d in levels]
    found, expected = detect(K, levels, settings), detect(K, without, settings)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
