"""Merges against their papers' formulas, a reference implementation's numbers, and torchvision."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.layers import batched_nms
from torchvision.ops import nms

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError
from retina_plugin.modeling.merging import (
    build_merge,
    fuse_views,
    soft_nms,
    weighted_boxes_fusion,
)

NAMES = KEYS["TEST.MERGE"].choices
# Numbers only: inputs, and what ensemble-boxes 1.0.9 gave for them; "made_by" says how.
REFERENCE = json.loads((Path(__file__).parent / "merging_reference.json").read_text())


def detections(num=60, num_objects=8, num_classes=3, seed=0):
    """Clusters of boxes on an image of about 400 px."""
    torch.manual_seed(seed)
    centers, sides = torch.rand(num_objects, 2) * 300 + 50, torch.rand(num_objects, 2) * 60 + 30
    i = torch.randint(num_objects, (num,))
    centers = centers[i] + torch.randn(num, 2) * 5
    sides = sides[i] * (0.15 * torch.randn(num, 2)).exp()
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    return boxes, torch.rand(num), torch.randint(num_classes, (num,))


def iou(a, b):
    """Of two lists of 4 numbers."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def by_class(merge):
    """Apply ``merge``, which takes and gives [(score, box)], to each class."""

    def merged(boxes, scores, classes):
        rows = []
        for class_ in set(classes.tolist()):
            own = [
                (s, b)
                for b, s, c in zip(boxes.double().tolist(), scores.double().tolist(), classes)
                if c == class_
            ]
            rows += [(score, box, class_) for score, box in merge(own)]
        return sorted(rows, key=lambda row: -row[0])

    return merged


def published_wbf(thresh, num_views):
    """Section 3 of arXiv:1910.13302: lists L (clusters) and F (fused boxes), steps 1 to 6."""

    def merge(own):
        clusters, fused = [], []
        for score, box in sorted(own, key=lambda row: -row[0]):
            overlaps = [iou(f, box) for f in fused]
            best = max(range(len(fused)), key=overlaps.__getitem__, default=None)
            if best is None or overlaps[best] <= thresh:
                clusters.append([(score, box)])
                fused.append(box)
                continue
            clusters[best].append((score, box))
            total = math.fsum(s for s, _ in clusters[best])
            fused[best] = [math.fsum(s * b[k] for s, b in clusters[best]) / total for k in range(4)]
        scores = [
            math.fsum(s for s, _ in c) / len(c) * min(len(c), num_views) / num_views
            for c in clusters
        ]
        return list(zip(scores, fused))

    return merge


def published_soft_nms(weight, min_score):
    """Figure 2 of arXiv:1704.04503; ``weight`` is f(IoU)."""

    def merge(own):
        waiting, taken = list(own), []
        while waiting:
            best = max(waiting, key=lambda row: row[0])
            waiting.remove(best)
            taken.append(best)
            waiting = [(s * weight(iou(best[1], b)), b) for s, b in waiting]
        return [(s, b) for s, b in taken if s >= min_score]

    return merge


def assert_equal(got, expected, tolerance=1e-6):
    """``expected``: rows (score, box, class), by decreasing score."""
    boxes, scores, classes = got
    assert len(scores) == len(expected) > 0
    assert scores.tolist() == pytest.approx([row[0] for row in expected], abs=tolerance)
    assert classes.tolist() == [row[2] for row in expected]
    scale = boxes.abs().max().item()
    for box, row in zip(boxes.tolist(), expected):
        assert box == pytest.approx(row[1], abs=tolerance * scale)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("thresh", "num_views"), [(0.4, 1), (0.55, 3), (0.7, 5)])
def test_wbf_is_the_published_algorithm(thresh, num_views, seed):
    found = detections(seed=seed)
    got = weighted_boxes_fusion(*found, iou_thresh=thresh, num_views=num_views)
    assert len(got[1]) < 60  # boxes were fused
    assert_equal(got, by_class(published_wbf(thresh, num_views))(*found))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_soft_nms_is_the_published_algorithm(method, seed):
    found = detections(seed=seed)
    weight = {
        "gaussian": lambda x: math.exp(-(x**2) / 0.5),
        "linear": lambda x: 1 - x if x > 0.3 else 1.0,
    }[method]
    got = soft_nms(*found, method=method)
    assert_equal(got, by_class(published_soft_nms(weight, 0.001))(*found))


@pytest.mark.parametrize(
    "case", REFERENCE["results"], ids=lambda c: f"{c['name']}-{c['views']}-{c['iou_thresh']}"
)
def test_numbers_of_the_reference_implementation(case):
    views = REFERENCE["views"][-case["views"] :]
    found = [
        torch.cat([torch.tensor(view[key], dtype=torch.float64) for view in views])
        for key in ("boxes", "scores", "classes")
    ]
    if case["name"] == "wbf":
        got = weighted_boxes_fusion(*found, iou_thresh=case["iou_thresh"], num_views=len(views))
    else:
        got = soft_nms(*found, method=case["name"], iou_thresh=case["iou_thresh"])
    boxes, scores, classes = case["result"]
    assert_equal(got, list(zip(scores, boxes, classes)))


def test_nms_is_detectron2s_and_class_agnostic_is_torchvisions_to_the_bit():
    boxes, scores, classes = detections(300)
    for name, keep in (
        ("nms", batched_nms(boxes, scores, classes, 0.5)),
        ("class_agnostic", nms(boxes, scores, 0.5)),
    ):
        got = build_merge(name, iou_thresh=0.5)(boxes, scores, classes)
        assert 0 < len(keep) < 300
        for x, y in zip(got, (boxes, scores, classes)):
            assert torch.equal(x, y[keep])


@pytest.mark.parametrize("name", NAMES)
def test_scores_decrease_and_equal_ones_keep_their_order(name):
    """Boxes far apart stay as they are, to the bit."""
    boxes = torch.arange(6.0)[:, None] * 100 + torch.tensor([0.1, 0.2, 33.3, 41.7])
    scores = torch.tensor([0.1, 0.7, 0.3, 0.7, 0.9, 0.3])
    classes = torch.tensor([0, 2, 1, 0, 5, 1])
    order = [4, 1, 3, 2, 5, 0]
    got = build_merge(name, iou_thresh=0.5)(boxes, scores, classes)
    for x, y in zip(got, (boxes, scores, classes)):
        assert torch.equal(x, y[order]) and x.dtype == y.dtype


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num", [0, 1])
def test_none_and_one(name, num):
    found = detections(num)
    for got in (
        build_merge(name, iou_thresh=0.5)(*found),
        fuse_views([found], iou_thresh=0.5, name=name),
    ):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, found))


@pytest.mark.parametrize("name", NAMES)
def test_boxes_without_area_and_scores_of_0_give_no_nan(name):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [0, 0, 10, 10]])
    got = build_merge(name, iou_thresh=0.5)(
        boxes, torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    )
    assert all(x.isfinite().all() for x in got)


def test_classes_do_not_merge_with_each_other_unless_asked():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    scores, classes = torch.tensor([0.8, 0.6]), torch.tensor([1, 0])
    for name in NAMES:
        got = build_merge(name, iou_thresh=0.5)(boxes, scores, classes)
        assert got[1].tolist() == scores.tolist()[: 1 if name == "class_agnostic" else 2]


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="TEST.MERGE: unknown 'wfb'.*known: nms"):
        build_merge("wfb", iou_thresh=0.5)
    with pytest.raises(ConfigError, match="method: unknown 'cubic'"):
        soft_nms(*detections(2), method="cubic")


@pytest.mark.parametrize("name", NAMES)
def test_order_of_views_does_not_matter(name):
    views = [detections(20, seed=1), detections(0), detections(30, seed=2)]
    got = fuse_views(views, iou_thresh=0.5, name=name)
    other = fuse_views(views[::-1], iou_thresh=0.5, name=name)
    for x, y in zip(got, other):
        assert len(x) == len(y) and torch.allclose(x.double(), y.double(), atol=1e-4)


def test_a_view_without_detections_lowers_what_the_others_found():
    view, nothing = detections(1), detections(0)
    boxes, scores, classes = fuse_views([nothing, view], iou_thresh=0.5)
    assert torch.equal(boxes, view[0]) and torch.equal(classes, view[2])
    assert scores.item() == view[1].item() / 2
    assert len(fuse_views([nothing, nothing], iou_thresh=0.5)[0]) == 0
