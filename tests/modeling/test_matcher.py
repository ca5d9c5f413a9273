"""Labels equal Detectron2's Matcher bit for bit, but for boxes that no anchor touches."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import AnchorMatcher, matcher


def grid_anchors(size=96, stride=8, sides=(16, 32, 40)):
    ys, xs = torch.meshgrid(
        torch.arange(0, size, stride), torch.arange(0, size, stride), indexing="ij"
    )
    centre = torch.stack([xs, ys], dim=-1).reshape(-1, 1, 2).float()
    half = torch.tensor([[s / 2, s / 2 * r] for s in sides for r in (0.5, 1.0, 2.0)])
    return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)


def random_boxes(n, seed, size=96):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=generator) * size * 0.4
    return torch.cat([corner, corner + side], dim=1)


def detectron2(gt, anchors, low_quality):
    reference = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=low_quality)
    return reference(pairwise_iou(Boxes(gt), Boxes(anchors)))


ADVERSARIAL = {
    "none": torch.zeros(0, 4),
    "identical to anchors": grid_anchors()[[5, 300, 301]],
    "duplicates": random_boxes(4, 0).repeat(3, 1),
    "integers, many ties": (random_boxes(20, 1) / 8).round() * 8 + torch.tensor([0, 0, 8, 8]),
    "partly outside": random_boxes(6, 2) - 30,
    # IoU of the first anchor with a box of 2/5 and 1/2 of its width is exactly at the thresholds
    "at the thresholds": torch.cat(
        [
            grid_anchors()[700:701] * torch.tensor([1, 1, 0, 1.0])
            + torch.tensor([0, 0, 1.0, 0]) * (grid_anchors()[700, 0] + w)
            for w in (0.4 * 16, 0.5 * 16, 8.0)
        ]
    ),
    "whole image and one pixel": torch.tensor([[0, 0, 96, 96], [40, 40, 41, 41.0]]),
    "crowd": random_boxes(150, 3),
}


@pytest.mark.parametrize("gt", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("low_quality", ["always", "never"])
@pytest.mark.parametrize("chunk", [1, 5000, 1 << 20])
def test_equals_detectron2(monkeypatch, gt, low_quality, chunk):
    monkeypatch.setattr(matcher, "_CHUNK", chunk)
    anchors = grid_anchors()
    index, label = AnchorMatcher([0.4, 0.5], [0, -1, 1], low_quality)(gt, anchors)
    expected_index, expected_label = detectron2(gt, anchors, low_quality == "always")
    assert torch.equal(index, expected_index)
    assert torch.equal(label, expected_label)


@pytest.mark.parametrize("seed", range(20))
def test_equals_detectron2_on_random_boxes(seed):
    anchors, gt = random_boxes(400, seed), random_boxes(1 + seed * 3, 100 + seed)
    touched = (pairwise_iou(Boxes(gt), Boxes(anchors)) > 0).any(dim=1)
    assert touched.all()
    index, label = AnchorMatcher([0.4, 0.5], [0, -1, 1], "always")(gt, anchors)
    expected_index, expected_label = detectron2(gt, anchors, True)
    assert torch.equal(index, expected_index) and torch.equal(label, expected_label)


@pytest.mark.parametrize(
    "untouched",
    [[500.0, 500, 520, 520], [30.0, 30, 30, 60], [50.0, 40, 40, 60]],
    ids=["outside", "without area", "turned inside out"],
)
@pytest.mark.parametrize("low_quality", ["always", "above_background", "never"])
def test_a_box_that_no_anchor_touches_promotes_nothing(untouched, low_quality):
    anchors, gt = grid_anchors(), torch.tensor([untouched])
    _, label = AnchorMatcher([0.4, 0.5], [0, -1, 1], low_quality)(gt, anchors)
    assert not label.any()


def test_where_detectron2_differs():
    """Its best IoU with an untouched box, 0, is that of all anchors: it makes all positive."""
    _, label = detectron2(torch.tensor([[500.0, 500, 520, 520]]), grid_anchors(), True)
    assert label.all()


def test_above_background_promotes_only_above_the_first_threshold():
    """Detectron: the best anchor of each box is promoted, then IoU < .4 is background again."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10]])
    # best IoUs .45 (between the thresholds), .3 (below) and .8 (positive anyway)
    gt = torch.tensor([[0.0, 0, 10, 4.5], [100, 0, 110, 3], [200, 0, 210, 8]])
    labels = {
        mode: AnchorMatcher([0.4, 0.5], [0, -1, 1], mode)(gt, anchors).label.tolist()
        for mode in ("always", "above_background", "never")
    }
    assert labels == {
        "always": [1, 1, 1],
        "above_background": [1, 0, 1],
        "never": [-1, 0, 1],
    }


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    sizes = []
    pairwise = matcher._pairwise_iou
    monkeypatch.setattr(
        matcher, "_pairwise_iou", lambda *a: sizes.append(pairwise(*a).numel()) or pairwise(*a)
    )
    monkeypatch.setattr(matcher, "_CHUNK", 4000)
    anchors, gt = grid_anchors(), random_boxes(50, 4)
    AnchorMatcher([0.4, 0.5], [0, -1, 1])(gt, anchors)
    assert sum(sizes) == 50 * len(anchors) and max(sizes) <= 4000


@pytest.mark.parametrize(
    "args, named",
    [
        (([], [1]), "IOU_THRESHOLDS"),
        (([0.5, 0.4], [0, -1, 1]), "IOU_THRESHOLDS"),
        (([0.4, 0.5], [0, 1]), "IOU_LABELS"),
        (([0.5], [0, 2]), "IOU_LABELS"),
        (([0.5], [0, 1], "sometimes"), "LOW_QUALITY_MATCHES.*always, above_background, never"),
    ],
)
def test_impossible_settings_name_their_key(args, named):
    with pytest.raises(ConfigError, match=named):
        AnchorMatcher(*args)
