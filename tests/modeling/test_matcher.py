"""Labels and indices equal Detectron2's Matcher, except for boxes that no anchor touches."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch.utils._python_dispatch import TorchDispatchMode

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling import AnchorMatcher

PAPER = [0.4, 0.5], [0, -1, 1]
MODES = KEYS["MODEL.RETINANET.LOW_QUALITY_MATCHES"].choices


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
    side = 4 + torch.rand(n, 2, generator=generator) * 96 * 0.4
    return torch.cat([corner, corner + side], dim=1)


def reference(gt, anchors, low_quality, thresholds=PAPER[0], labels=PAPER[1]):
    """Detectron2's IoUs, index and thresholds; low-quality matches from the whole matrix."""
    iou = pairwise_iou(Boxes(gt), Boxes(anchors))
    index, label = Matcher(thresholds, labels, allow_low_quality_matches=False)(iou)
    if len(gt) and low_quality != "never":
        highest = iou.max(dim=1, keepdim=True).values
        promoted = ((iou == highest) & (highest > 0)).any(dim=0)
        if low_quality == "above_background":
            promoted &= iou.max(dim=0).values >= thresholds[0]
        label[promoted] = 1
    return index, in_our_code(label)


def in_our_code(label):
    """Detectron2's 1, 0, -1 as 0, BACKGROUND, IGNORED."""
    code = torch.tensor([IGNORED, BACKGROUND, 0], dtype=torch.int8)
    return code[label.long() + 1]


@pytest.fixture(params=["cpu", "cuda"])
def assert_same(request, pretend):
    """assert_same(gt, anchors, low_quality, thresholds, labels), with the code for this device."""

    def check(gt, anchors, low_quality, *settings, device=request.param):
        matcher = AnchorMatcher(*(settings or PAPER), low_quality)
        with pretend(device, anchors):
            index, label = matcher(gt, anchors)
        expected_index, expected_label = reference(gt, anchors, low_quality, *settings)
        assert index.dtype == torch.int64 and label.dtype == torch.int8
        assert torch.equal(index, expected_index)
        assert torch.equal(label, expected_label)

    return check


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
    "many": random_boxes(150, 3),
    "not all are boxes": torch.tensor(
        [
            [500, 500, 520, 520],  # outside
            [30, 30, 30, 60],  # without width
            [50, 40, 40, 60],  # swapped corners: in x, in y, in both
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
# anchors (48 x 48 x 9 are several pieces), boxes around those of the case, device
SCENES = {
    "one piece of anchors": (96, 0, "cpu"),
    "several pieces, few boxes": (384, 0, "cpu"),
    "several pieces, many boxes": (384, 100, "cpu"),
    "GPU": (96, 0, "cuda"),
    "GPU, several steps": (384, 420, "cuda"),
}


@pytest.mark.parametrize("gt", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("low_quality", MODES)
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_equals_detectron2(pretend, scene, gt, low_quality):
    """Index and label of each anchor, for any boxes, and for anchors without area."""
    size, num_others, device = scene
    others = random_boxes(num_others, 20, size)
    gt = torch.cat([others[: num_others // 2], gt, others[num_others // 2 :]])
    flat = torch.tensor([[0.0, 0, 0, 0], [-5, 3, 60, 3], [40, 40, 40, 60]])
    anchors = torch.cat([flat, grid_anchors(size)])
    with pretend(device, anchors):
        index, label = AnchorMatcher(*PAPER, low_quality)(gt, anchors)
    expected_index, expected_label = reference(gt, anchors, low_quality)
    assert index.dtype == torch.int64 and label.dtype == torch.int8
    assert torch.equal(index, expected_index)
    assert torch.equal(label, expected_label)


def test_ious_are_detectron2s_to_the_bit(assert_same):
    """Each IoU and the next float above it are thresholds, so its last bit decides the label."""
    anchors = random_boxes(200, 14)
    for gt in random_boxes(20, 13).split(1):
        iou = pairwise_iou(Boxes(gt), Boxes(anchors)).flatten()
        iou = iou[iou > 0]
        edges = torch.cat([iou, iou.nextafter(torch.tensor(2.0))]).unique()
        labels = ([0, -1] * len(edges))[: len(edges) + 1]
        assert len(edges) > 20
        assert_same(gt, anchors, "never", edges.tolist(), labels)


def test_the_reference_is_detectron2():
    """Where an anchor touches every box, its low-quality matches are Detectron2's."""
    gt, anchors = random_boxes(30, 7), grid_anchors()
    _, label = Matcher(*PAPER, allow_low_quality_matches=True)(
        pairwise_iou(Boxes(gt), Boxes(anchors))
    )
    assert torch.equal(in_our_code(label), reference(gt, anchors, "always")[1])


@pytest.mark.parametrize("seed", range(20))
def test_anchors_need_no_grid(assert_same, seed):
    """Random anchors, some without area or with swapped corners, and duplicates."""
    anchors, gt = random_boxes(20_000, seed, 384), random_boxes(1 + seed * 6, 100 + seed, 384)
    anchors[::50, 2] = anchors[::50, 0]
    anchors[1::50, 3] -= 200
    anchors[2::50] = anchors[2::50].flip(1)
    anchors[3::50] = anchors[4::50]
    assert_same(gt, anchors, MODES[seed % 3])


@pytest.mark.parametrize("side", [1e-18, 1e-3, 1e6, 1e12])
def test_any_scale(assert_same, side):
    """Areas near the limits of float32, at coordinates that round them away or not."""
    assert_same(random_boxes(12, 8) * side, random_boxes(300, 9) * side, "always")


@pytest.mark.parametrize("labels", [[0, 1], [-1, 0, 1], [0, -1, 0, 1], [0, 1, -1, 0]])
def test_any_labels(assert_same, labels):
    """The labels of the intervals need not increase."""
    thresholds = [0.3, 0.4, 0.7][: len(labels) - 1]
    assert_same(random_boxes(40, 6), grid_anchors(), "always", thresholds, labels)


@pytest.mark.parametrize("gt_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("anchors_dtype", [torch.float32, torch.float64])
def test_float64(assert_same, gt_dtype, anchors_dtype):
    """IoUs have the type to which PyTorch promotes boxes and anchors, as in Detectron2."""
    gt, anchors = random_boxes(20, 10).to(gt_dtype), (random_boxes(300, 11) / 3).to(anchors_dtype)
    assert_same(gt / 3, anchors, "above_background")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_anchors(pretend, device):
    anchors = torch.zeros(0, 4)
    with pretend(device, anchors):
        index, label = AnchorMatcher(*PAPER)(random_boxes(3, 0), anchors)
    assert index.shape == label.shape == (0,)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inputs_are_not_modified(pretend, device):
    gt, anchors = ADVERSARIAL["not all are boxes"].clone(), grid_anchors()
    with pretend(device, anchors):
        AnchorMatcher(*PAPER)(gt, anchors)
    torch.testing.assert_close(gt, ADVERSARIAL["not all are boxes"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(anchors, grid_anchors())


def test_where_detectron2_differs():
    """A box that no anchor touches has IoU 0 with all: Detectron2 makes all of them positive."""
    outside, anchors = torch.tensor([[500.0, 500, 520, 520]]), grid_anchors()
    _, theirs = Matcher(*PAPER, allow_low_quality_matches=True)(
        pairwise_iou(Boxes(outside), Boxes(anchors))
    )
    ours = AnchorMatcher(*PAPER, "always")(outside, anchors).label
    assert (theirs == 1).all() and (ours == BACKGROUND).all()


def test_above_background_promotes_only_above_the_first_threshold():
    """Detectron: the best anchor of each box is positive, then IoU < .4 is background again."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10]])
    # best IoUs .45 (between the thresholds), .3 (below) and .8 (positive anyway)
    gt = torch.tensor([[0.0, 0, 10, 4.5], [100, 0, 110, 3], [200, 0, 210, 8]])
    labels = {mode: AnchorMatcher(*PAPER, mode)(gt, anchors).label.tolist() for mode in MODES}
    assert labels == {
        "always": [0, 0, 0],
        "above_background": [0, BACKGROUND, 0],
        "never": [IGNORED, BACKGROUND, 0],
    }


class Watch(TorchDispatchMode):
    """Notes the size of the largest result, and of each result of ``minimum``.

    The matcher computes an IoU from two minima, that of the right and that of the lower edges.
    """

    def __init__(self):
        super().__init__()
        self.largest, self.minima = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        if func.overloadpacket.__name__ == "minimum":
            self.minima.append(out.numel())
        return out

    @property
    def num_ious(self):
        return sum(self.minima) / 2


@pytest.mark.parametrize("device, count, limit", [("cpu", 150, 2**19), ("cuda", 900, 2**23)])
def test_memory_is_bounded(pretend, device, count, limit):
    """No tensor has much more than 2^18 elements on the CPU, 2^23 on a GPU."""
    anchors, gt = grid_anchors(384), random_boxes(count, 4, 384)
    with pretend(device, anchors), Watch() as watch:
        AnchorMatcher(*PAPER)(gt, anchors)
    assert watch.largest <= limit < len(gt) * len(anchors) / 2


def test_cpu_computes_only_ious_of_boxes_near_the_anchors():
    """Two groups of anchors far apart, each with its boxes: half of all IoUs are left out."""
    near = grid_anchors(512)[: 2**15]  # whole pieces
    gt = random_boxes(40, 12, 512)
    with Watch() as watch:
        matches = AnchorMatcher(*PAPER, "never")(
            torch.cat([gt, gt + 10_000]), torch.cat([near, near + 10_000])
        )
    assert watch.num_ious <= 2 * len(gt) * len(near)
    assert (matches.label == 0).sum() > 100


def test_few_boxes_take_one_step():
    """A box meets all pieces of anchors that it touches at once, and no others."""
    anchors = grid_anchors(512)
    with Watch() as watch:
        AnchorMatcher(*PAPER, "always")(torch.tensor([[10.0, 10, 30, 200]]), anchors)
    assert len(watch.minima) == 2 and 2**13 < watch.num_ious < len(anchors)


@pytest.mark.parametrize(
    "args, message",
    [
        (([], [1]), "MODEL.RETINANET.IOU_THRESHOLDS"),
        (([0.5, 0.4], [0, -1, 1]), "MODEL.RETINANET.IOU_THRESHOLDS"),
        (([0.4, 0.5], [0, 1]), "MODEL.RETINANET.IOU_LABELS"),
        (([0.5], [0, 2]), "MODEL.RETINANET.IOU_LABELS"),
        (([0.5], [-2, 1]), "MODEL.RETINANET.IOU_LABELS"),  # Detectron2's code, not ours
        (([0.5], [1, 0]), "MODEL.RETINANET.IOU_LABELS.*first"),
        (
            ([0.5], [0, 1], "sometimes"),
            "MODEL.RETINANET.LOW_QUALITY_MATCHES.*always, above_background, never",
        ),
    ],
)
def test_invalid_settings_name_their_key(args, message):
    with pytest.raises(ConfigError, match=message):
        AnchorMatcher(*args)
