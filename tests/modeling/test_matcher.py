"""Labels and indices equal Detectron2's Matcher, but for boxes that no anchor touches."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch.utils._python_dispatch import TorchDispatchMode

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import AnchorMatcher, matcher

PAPER = [0.4, 0.5], [0, -1, 1]
MODES = matcher.LOW_QUALITY_MATCHES


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


def reference(gt, anchors, low_quality, thresholds=PAPER[0], labels=PAPER[1]):
    """Detectron2's IoUs, index and thresholds; the promotions by the whole matrix."""
    iou = pairwise_iou(Boxes(gt), Boxes(anchors))
    index, label = Matcher(thresholds, labels, allow_low_quality_matches=False)(iou)
    if len(gt) and low_quality != "never":
        highest = iou.max(dim=1, keepdim=True).values
        promoted = ((iou == highest) & (highest > 0)).any(dim=0)
        if low_quality == "above_background":
            promoted &= iou.max(dim=0).values >= thresholds[0]
        label[promoted] = 1
    return index, label


def assert_same(gt, anchors, low_quality, *settings):
    index, label = AnchorMatcher(*(settings or PAPER), low_quality)(gt, anchors)
    expected_index, expected_label = reference(gt, anchors, low_quality, *settings)
    assert index.dtype == torch.int64 and label.dtype == torch.int8
    assert torch.equal(index, expected_index)
    assert torch.equal(label, expected_label)


@pytest.fixture(params=["pieces", "merged pieces", "one piece", "accelerator"])
def path(request, monkeypatch):
    """Each way through the matcher: short pieces and few boxes at a time, or all at once."""
    if "pieces" in request.param:
        monkeypatch.setattr(matcher, "_SHORTEST", 100)
        monkeypatch.setattr(matcher, "_LONGEST", 100)
    if request.param == "pieces":
        monkeypatch.setattr(matcher, "_IOUS", 300)
    if request.param == "accelerator":
        monkeypatch.setattr(matcher, "_match_touching", matcher._match_all)
        monkeypatch.setattr(matcher, "_IOUS_ON_ACCELERATOR", 5000)
    return request.param


ANCHOR = grid_anchors()[700]
INF, NAN = float("inf"), float("nan")
ADVERSARIAL = {
    "none": torch.zeros(0, 4),
    "one": random_boxes(1, 5),
    "identical to anchors": grid_anchors()[[5, 300, 301]],
    "duplicates": random_boxes(4, 0).repeat(3, 1),
    "integers, many ties": (random_boxes(20, 1) / 8).round() * 8 + torch.tensor([0, 0, 8, 8]),
    "partly outside": random_boxes(6, 2) - 30,
    # the IoU of an anchor 16 wide with a box of 2/5 and 1/2 of its width is at the thresholds
    "at the thresholds": torch.stack(
        [torch.tensor([*ANCHOR[:2], ANCHOR[0] + w, ANCHOR[3]]) for w in (0.4 * 16, 0.5 * 16)]
    ),
    "whole image and one pixel": torch.tensor([[0, 0, 96, 96], [40, 40, 41, 41.0]]),
    "crowd": random_boxes(150, 3),
    "not all are boxes": torch.tensor(
        [
            [500, 500, 520, 520],  # outside
            [30, 30, 30, 60],  # without width
            [50, 40, 40, 60],  # turned inside out: in x, in y, in both
            [40, 60, 60, 40],
            [60, 60, 40, 40],
            [NAN, 0, 50, 50],
            [0, 0, INF, INF],
            [INF, INF, -INF, -INF],
            [20, 20, 20 + 1e-30, 20 + 1e-30],
            [0, 0, 1e-30, 1e-30],  # an area that float32 rounds to 0
            [40, 40, 70, 60],
            [0, 0, 30, 30],
        ]
    ),
}


@pytest.mark.parametrize("gt", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("low_quality", MODES)
def test_equals_detectron2(path, gt, low_quality):
    """Index and label of each anchor, whatever the boxes, and with anchors without area."""
    flat = torch.tensor([[0.0, 0, 0, 0], [-5, 3, 60, 3], [40, 40, 40, 60]])
    assert_same(gt, torch.cat([flat, grid_anchors()]), low_quality)


def test_ious_are_detectron2s_to_the_bit():
    """Not only near a tie or a threshold, where labels and indices would tell."""
    gt, anchors = random_boxes(50, 13), random_boxes(200, 14)
    boxes = matcher._Boxes.of(gt)
    iou = matcher._Anchors.of(anchors.t().contiguous(), boxes).iou(boxes)
    assert torch.equal(iou.clamp(min=0), pairwise_iou(Boxes(gt), Boxes(anchors)))


def test_the_reference_is_detectron2():
    """Where every box is touched, its promotions are those of Detectron2."""
    gt, anchors = random_boxes(30, 7), grid_anchors()
    _, label = Matcher(*PAPER, allow_low_quality_matches=True)(
        pairwise_iou(Boxes(gt), Boxes(anchors))
    )
    assert torch.equal(label, reference(gt, anchors, "always")[1])


@pytest.mark.parametrize("seed", range(20))
def test_anchors_need_no_grid(path, seed):
    """Random anchors, with some that have no area or are turned inside out, and duplicates."""
    anchors, gt = random_boxes(400, seed), random_boxes(1 + seed * 3, 100 + seed)
    anchors[::50, 2] = anchors[::50, 0]
    anchors[1::50, 3] -= 200
    anchors[2::50] = anchors[2::50].flip(1)
    anchors[3::50] = anchors[4::50]
    assert_same(gt, anchors, MODES[seed % 3])


@pytest.mark.parametrize("side", [1e-18, 1e-3, 1e6, 1e12])
def test_any_scale(path, side):
    """Areas near the limits of float32, at coordinates that round them away or not."""
    assert_same(random_boxes(12, 8) * side, random_boxes(300, 9) * side, "always")


@pytest.mark.parametrize("labels", [[0, 1], [-1, 0, 1], [0, -1, 0, 1], [0, 1, -1, 0]])
def test_any_labels(path, labels):
    """The labels of intervals need not rise."""
    thresholds = [0.3, 0.4, 0.7][: len(labels) - 1]
    assert_same(random_boxes(40, 6), grid_anchors(), "always", thresholds, labels)


@pytest.mark.parametrize("gt_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("anchors_dtype", [torch.float32, torch.float64])
def test_float64(path, gt_dtype, anchors_dtype):
    """IoUs are computed in what PyTorch promotes the two to, as in Detectron2."""
    gt, anchors = random_boxes(20, 10).to(gt_dtype), (random_boxes(300, 11) / 3).to(anchors_dtype)
    assert_same(gt / 3, anchors, "above_background")


def test_no_anchors(path):
    index, label = AnchorMatcher(*PAPER)(random_boxes(3, 0), torch.zeros(0, 4))
    assert index.shape == label.shape == (0,)


def test_inputs_stay(path):
    """In-place arithmetic touches the matcher's own tensors alone."""
    gt, anchors = ADVERSARIAL["not all are boxes"].clone(), grid_anchors()
    AnchorMatcher(*PAPER)(gt, anchors)
    torch.testing.assert_close(gt, ADVERSARIAL["not all are boxes"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(anchors, grid_anchors())


def test_where_detectron2_differs():
    """Its best IoU with an untouched box, 0, is that of all anchors: it makes all positive."""
    outside, anchors = torch.tensor([[500.0, 500, 520, 520]]), grid_anchors()
    _, theirs = Matcher(*PAPER, allow_low_quality_matches=True)(
        pairwise_iou(Boxes(outside), Boxes(anchors))
    )
    assert theirs.all() and not AnchorMatcher(*PAPER, "always")(outside, anchors).label.any()


def test_above_background_promotes_only_above_the_first_threshold():
    """Detectron: the best anchor of each box is promoted, then IoU < .4 is background again."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10]])
    # best IoUs .45 (between the thresholds), .3 (below) and .8 (positive anyway)
    gt = torch.tensor([[0.0, 0, 10, 4.5], [100, 0, 110, 3], [200, 0, 210, 8]])
    labels = {mode: AnchorMatcher(*PAPER, mode)(gt, anchors).label.tolist() for mode in MODES}
    assert labels == {
        "always": [1, 1, 1],
        "above_background": [1, 0, 1],
        "never": [-1, 0, 1],
    }


class Watch(TorchDispatchMode):
    """Counts operations, keeps the largest result, and names those that wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.calls, self.largest, self.waiting = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls += 1
        by_mask = name.startswith("index") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in self.WAITS or by_mask:
            self.waiting.append(name)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_memory_is_bounded(monkeypatch, path):
    """No tensor is larger than the coordinates of the anchors or the IoUs computed at a time."""
    monkeypatch.setattr(matcher, "_IOUS", min(matcher._IOUS, 20000))
    anchors, gt = grid_anchors(), random_boxes(150, 4)
    with Watch() as watch:
        AnchorMatcher(*PAPER)(gt, anchors)
    few = 5000 if path == "accelerator" else 2 * matcher._IOUS
    assert watch.largest <= max(4 * len(anchors), few) < len(gt) * len(anchors) / 2


@pytest.mark.parametrize("low_quality", MODES)
def test_an_accelerator_is_not_waited_for(monkeypatch, low_quality):
    """A few operations by boxes that fit in memory at a time, none of which needs its result."""
    monkeypatch.setattr(matcher, "_match_touching", matcher._match_all)
    with Watch() as watch:
        AnchorMatcher(*PAPER, low_quality)(random_boxes(500, 4), grid_anchors())
    assert watch.calls < 110 and not watch.waiting


def test_a_cpu_sees_only_the_boxes_that_touch_a_piece(monkeypatch):
    """Two clusters of anchors far apart, each with its boxes: half of the matrix is left out."""
    sizes = []
    iou = matcher._Anchors.iou
    monkeypatch.setattr(
        matcher._Anchors,
        "iou",
        lambda self, gt: sizes.append(len(gt.area_G) * len(self.area_R)) or iou(self, gt),
    )
    near, gt = grid_anchors(), random_boxes(10, 12)
    R = len(near)
    monkeypatch.setattr(matcher, "_SHORTEST", R)
    monkeypatch.setattr(matcher, "_LONGEST", R)
    monkeypatch.setattr(matcher, "_IOUS", 4 * R)  # two boxes more would be few
    assert_same(torch.cat([gt, gt + 1000]), torch.cat([near, near + 1000]), "never")
    assert sum(sizes) == 2 * 10 * R


def test_few_boxes_see_the_pieces_that_they_touch_at_once(monkeypatch):
    """One call for one box, and not with all anchors."""
    sizes = []
    iou = matcher._Anchors.iou
    monkeypatch.setattr(
        matcher._Anchors, "iou", lambda self, gt: sizes.append(len(self.area_R)) or iou(self, gt)
    )
    monkeypatch.setattr(matcher, "_SHORTEST", 50)
    monkeypatch.setattr(matcher, "_LONGEST", 50)
    anchors = grid_anchors()
    assert_same(torch.tensor([[10.0, 10, 30, 30]]), anchors, "always")
    assert len(sizes) == 1 and 50 < sizes[0] < len(anchors)


@pytest.mark.parametrize(
    "args, named",
    [
        (([], [1]), "IOU_THRESHOLDS"),
        (([0.5, 0.4], [0, -1, 1]), "IOU_THRESHOLDS"),
        (([0.4, 0.5], [0, 1]), "IOU_LABELS"),
        (([0.5], [0, 2]), "IOU_LABELS"),
        (([0.5], [1, 0]), "IOU_LABELS.*first"),
        (([0.5], [0, 1], "sometimes"), "LOW_QUALITY_MATCHES.*always, above_background, never"),
    ],
)
def test_impossible_settings_name_their_key(args, named):
    with pytest.raises(ConfigError, match=named):
        AnchorMatcher(*args)
