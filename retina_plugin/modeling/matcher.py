"""Exact anchor matching in bounded memory (section 4, "Anchors").

Detectron2 builds the whole G x R matrix of IoUs and several copies of it: gigabytes for a crowded
image. Here the matrix is never built; memory is bounded, and the result is the same to the bit.

On the CPU the anchors are split into pieces, and each piece is compared only with the boxes that
overlap its bounding box; all other IoUs of the piece are 0. Comparisons give floats 0 or 1, because
PyTorch vectorises these on the CPU. Comparisons to bool, ``max`` with indices and masked fills take
5 to 30 times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice
from retina_plugin.losses.targets import BACKGROUND, IGNORED

from .contracts import Matches

__all__ = ["AnchorMatcher"]

# IoUs computed in one step on the CPU, at most twice as many: the three temporaries of a step stay
# in the cache of a core.
_IOUS_PER_STEP = 1 << 18
# The same on a GPU, where it only bounds the memory: four temporaries of 32 MB.
_IOUS_PER_STEP_GPU = 1 << 23
# Fewest and most anchors of a piece. Short pieces meet fewer boxes, long pieces need fewer calls.
_MIN_PIECE, _MAX_PIECE = 1 << 12, 1 << 13

# Larger than the number of boxes of any image; float32 holds all integers up to it.
_INDEX_OFFSET = 1 << 24

# Detectron2's labels in IOU_LABELS -> ours. A matcher sees no classes, so a match has label 0.
_LABEL_CODES = {1: 0, 0: BACKGROUND, -1: IGNORED}


class AnchorMatcher:
    """Assign each anchor to the ground-truth box that it overlaps most (section 4, "Anchors").

    Args:
        thresholds: increasing IoUs that split [0, 1]; the paper's are (.4, .5).
        labels: the label of each interval in Detectron2's code: 1 positive, 0 background, -1
            ignored. There is one more than thresholds; the paper's are (0, -1, 1). An IoU at a
            threshold belongs to the interval above it. The first label is also that of anchors
            that no box overlaps, so it can't be 1.
        low_quality: whether an anchor with the highest IoU of some box is positive although this
            IoU is low. "always" (Detectron2); "above_background" (Detectron), only if the anchor's
            own best IoU reaches the first threshold; "never". A box that overlaps no anchor makes
            none positive (in Detectron2 it makes all of them positive).

    Raises:
        ConfigError: thresholds not increasing or not positive, a wrong number of labels, an unknown
            label, a positive first label, an unknown ``low_quality``.

    Example:
        >>> matcher = AnchorMatcher((0.4, 0.5), (0, -1, 1))
        >>> anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
        >>> matcher(torch.tensor([[0.0, 0, 10, 8]]), anchors)
        Matches(gt=tensor([0, 0]), label=tensor([ 0, -1], dtype=torch.int8))
    """

    def __init__(
        self, thresholds: Sequence[float], labels: Sequence[int], low_quality: str = "always"
    ) -> None:
        thresholds, labels = list(thresholds), list(labels)
        if not thresholds or thresholds[0] <= 0 or thresholds != sorted(thresholds):
            raise ConfigError(
                f"MODEL.RETINANET.IOU_THRESHOLDS must be positive and increasing, got {thresholds}"
            )
        if len(labels) != len(thresholds) + 1 or not set(labels) <= set(_LABEL_CODES):
            raise ConfigError(
                f"MODEL.RETINANET.IOU_LABELS must be {len(thresholds) + 1} of -1, 0, 1 for "
                f"IOU_THRESHOLDS {thresholds}, got {labels}"
            )
        if labels[0] == 1:
            raise ConfigError(
                "MODEL.RETINANET.IOU_LABELS: the first label is that of anchors that no box "
                f"overlaps, so it can't be 1 (positive), got {labels}"
            )
        key = "MODEL.RETINANET.LOW_QUALITY_MATCHES"
        check_choice(key, low_quality, KEYS[key].choices)
        self.thresholds = thresholds
        self.labels = [_LABEL_CODES[label] for label in labels]
        self.low_quality = low_quality

    @torch.no_grad()
    def __call__(self, gt_boxes_G4: Tensor, anchors_R4: Tensor) -> Matches:
        """Match one image, without GPU synchronisation.

        Args:
            gt_boxes_G4: XYXY in pixels, float32 or float64; G may be 0. A box that is not finite,
                has no area or has swapped corners overlaps no anchor.
            anchors_R4: any finite anchors in the same frame; R may be 0.

        Returns:
            What Detectron2's ``Matcher`` gives for ``pairwise_iou``, in our labels, except for
            boxes that overlap no anchor.
        """
        gt = _Boxes.of(gt_boxes_G4)
        # contiguous coordinates; ``t().contiguous()`` takes the CPU 4 times as long
        corners_4R = torch.stack(anchors_R4.unbind(dim=1))
        gt_R = corners_4R.new_zeros(len(anchors_R4), dtype=torch.int64)
        label_R = torch.full_like(gt_R, self.labels[0], dtype=torch.int8)
        if len(gt_boxes_G4) and len(anchors_R4):
            # choosing the boxes of a piece takes numbers on the host: a GPU would synchronise
            match = _match_touching if anchors_R4.device.type == "cpu" else _match_all
            for anchors, parts in match(gt, corners_4R, promote=self.low_quality != "never"):
                sizes = [part.stop - part.start for part in parts]
                labels = self._label(anchors.iou_R, anchors.promoted_R).split(sizes)
                for part, index, label in zip(parts, anchors.gt_R.split(sizes), labels):
                    gt_R[part], label_R[part] = index, label
        return Matches(gt_R, label_R)

    def _label(self, iou_R: Tensor, promoted_R: Tensor) -> Tensor:
        # sums of floats instead of masked fills, see the module's docstring
        label_R = torch.full_like(iou_R, self.labels[0])
        at_least_R = torch.empty_like(label_R)  # 1 or 0
        for threshold, below, above in zip(self.thresholds, self.labels, self.labels[1:]):
            torch.ge(iou_R, threshold, out=at_least_R)
            label_R.add_(at_least_R, alpha=above - below)
        if self.low_quality == "above_background":
            promoted_R = promoted_R.mul_(torch.ge(iou_R, self.thresholds[0], out=at_least_R))
        # plus 2, then at most 0: makes 0 (matched) of each label, which is 0, -1 or -2
        return label_R.add_(promoted_R, alpha=2).clamp_(max=0)


class _Boxes(NamedTuple):
    """G ground-truth boxes."""

    corners_G4: Tensor
    area_G: Tensor  # inf for a box without area: its IoUs are 0 then, not NaN
    index_G: Tensor  # 0 .. G - 1, minus _INDEX_OFFSET: all negative, the first box has the least

    @classmethod
    def of(cls, corners_G4: Tensor) -> _Boxes:
        x1, y1, x2, y2 = corners_G4.unbind(dim=1)
        area_G = (x2 - x1) * (y2 - y1)
        has_area_G = (x2 > x1) & (y2 > y1) & (area_G > 0)  # False for NaN
        return cls(
            corners_G4.masked_fill(~has_area_G[:, None], 0),
            area_G.masked_fill(~has_area_G, torch.inf),
            torch.arange(len(area_G), dtype=area_G.dtype, device=area_G.device) - _INDEX_OFFSET,
        )

    def take(self, index: Tensor) -> _Boxes:
        return _Boxes(*(x[index] for x in self))

    def split(self, size: int) -> Iterator[_Boxes]:
        return map(_Boxes, *(x.split(size) for x in self))


class _Anchors(NamedTuple):
    """R anchors and their best match so far; all fields are floats and are updated in place."""

    corners_4R: Tensor
    area_R: Tensor
    iou_R: Tensor  # the highest IoU so far
    gt_R: Tensor  # index of the box that has it; 0 if the IoU is 0
    promoted_R: Tensor  # 1 if the anchor has the highest IoU of some box, else 0

    @classmethod
    def of(cls, corners_4R: Tensor, gt: _Boxes) -> _Anchors:
        x1, y1, x2, y2 = corners_4R
        # an anchor with swapped corners has no area either
        area_R = (x2 - x1).mul_(y2 - y1).clamp_(min=0)
        dtype = torch.promote_types(corners_4R.dtype, gt.area_G.dtype)
        return cls(corners_4R, area_R, *area_R.new_zeros((3, len(area_R)), dtype=dtype))

    def iou(self, gt: _Boxes) -> Tensor:
        """(g, R) IoU; where boxes do not overlap a negative number may stand for 0.

        Positive IoUs come from the same operations, in the same order, as in
        ``detectron2.structures.pairwise_iou``. A union is never 0, so it needs no check for that.
        """
        x1, y1, x2, y2 = (c[:, None] for c in gt.corners_G4.unbind(dim=1))
        ax1, ay1, ax2, ay2 = self.corners_4R
        # Clamping the width is enough: with width >= 0, a negative height gives an IoU <= 0.
        width = torch.min(x2, ax2).sub_(torch.max(x1, ax1)).clamp_(min=0)
        height = torch.min(y2, ay2).sub_(torch.max(y1, ay1))
        intersection = width.mul_(height)
        union = torch.add(gt.area_G[:, None], self.area_R, out=height).sub_(intersection)
        return intersection.div_(union)

    def update(self, iou_gR: Tensor, gt: _Boxes) -> None:
        """Compare with more boxes, which follow those seen so far. Overwrites ``iou_gR``."""
        if len(iou_gR) == 1:
            iou_R, index_R = iou_gR[0], gt.index_G
        else:
            iou_R = iou_gR.amax(dim=0)
            # the first of the boxes with the highest IoU; 0 for the others is above every index
            index_R = iou_gR.eq_(iou_R).mul_(gt.index_G[:, None]).amin(dim=0)
        # strictly greater: of equal IoUs the first box stays
        better_R = torch.gt(iou_R, self.iou_R, out=torch.empty_like(iou_R))
        self.gt_R.lerp_(index_R + _INDEX_OFFSET, better_R)
        torch.max(self.iou_R, iou_R, out=self.iou_R)

    def promote(self, iou_gR: Tensor, highest_g1: Tensor) -> None:
        """Mark the anchors that have the highest IoU of a box, unless this IoU is 0."""
        at_highest_gR = torch.eq(iou_gR, highest_g1, out=torch.empty_like(iou_gR))
        at_highest_gR.mul_(highest_g1 > 0)
        torch.max(self.promoted_R, at_highest_gR.amax(dim=0), out=self.promoted_R)


class _Matched(NamedTuple):
    """Anchors after all boxes, and the parts of the image's anchors that they are, in order."""

    anchors: _Anchors
    parts: list[slice]


def _match_all(gt: _Boxes, corners_4R: Tensor, promote: bool) -> list[_Matched]:
    """All anchors with all boxes, some boxes at a time: more work, but no synchronisation."""
    anchors = _Anchors.of(corners_4R, gt)
    for step_gt in gt.split(max(1, _IOUS_PER_STEP_GPU // len(anchors.area_R))):
        iou_gR = anchors.iou(step_gt)
        if promote:
            anchors.promote(iou_gR, iou_gR.amax(dim=1, keepdim=True))
        anchors.update(iou_gR, step_gt)
    return [_Matched(anchors, [slice(0, len(anchors.area_R))])]


def _match_touching(gt: _Boxes, corners_4R: Tensor, promote: bool) -> list[_Matched]:
    """Each piece of the anchors with the boxes that overlap its bounding box: the CPU's way.

    Pieces that no box overlaps are left out.
    """
    G, R = len(gt.area_G), corners_4R.shape[1]
    length = min(max(_IOUS_PER_STEP // G, _MIN_PIECE), _MAX_PIECE)
    touching_BG = _touching(gt, corners_4R, length)
    touched = touching_BG.any(dim=1).nonzero().flatten().tolist()
    parts = {b: slice(b * length, min((b + 1) * length, R)) for b in touched}
    if 0 < G * len(touched) * length <= 2 * _IOUS_PER_STEP:
        # few boxes: one step for all pieces is faster than leaving out boxes piece by piece
        merged = torch.cat([corners_4R[:, part] for part in parts.values()], dim=1)
        return [_Matched(_match_all(gt, merged, promote)[0].anchors, list(parts.values()))]
    boxes_per_step = max(1, _IOUS_PER_STEP // length)
    pieces = {b: _Anchors.of(corners_4R[:, part], gt) for b, part in parts.items()}
    dtype = torch.promote_types(corners_4R.dtype, gt.area_G.dtype)
    highest_BG = torch.zeros_like(touching_BG, dtype=dtype)
    for b, index in _rows(touching_BG, boxes_per_step):
        step_gt = gt.take(index)
        iou_gR = pieces[b].iou(step_gt)
        if promote:
            highest_BG[b, index] = iou_gR.amax(dim=1)
        pieces[b].update(iou_gR, step_gt)
    if promote:
        # A box's highest IoU is known only after all pieces. The IoUs were not kept. Compute them
        # again for the few pieces that contain the highest.
        highest_G = highest_BG.amax(dim=0)
        for b, index in _rows((highest_BG == highest_G) & (highest_G > 0), boxes_per_step):
            pieces[b].promote(pieces[b].iou(gt.take(index)), highest_G[index, None])
    return [_Matched(anchors, [parts[b]]) for b, anchors in pieces.items()]


def _touching(gt: _Boxes, corners_4R: Tensor, length: int) -> Tensor:
    """(B, G) bool: whether the box overlaps the bounding box of the piece.

    Each piece has ``length`` anchors, the last one may be shorter.
    """
    whole = corners_4R.shape[1] // length * length
    parts = [corners_4R[:, :whole].unflatten(1, (-1, length)), corners_4R[:, None, whole:]]
    parts = [part for part in parts if part.numel()]
    low_2B = torch.cat([part[:2].amin(dim=2) for part in parts], dim=1)
    high_2B = torch.cat([part[2:].amax(dim=2) for part in parts], dim=1)
    below_2BG = gt.corners_G4.t()[:2, None] < high_2B[:, :, None]
    above_2BG = gt.corners_G4.t()[2:, None] > low_2B[:, :, None]
    return (below_2BG & above_2BG).all(dim=0)


def _rows(chosen_BG: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """(row, its chosen columns), at most ``step`` columns at a time, in order."""
    _, column = chosen_BG.nonzero(as_tuple=True)
    for row, columns in enumerate(column.split(chosen_BG.sum(dim=1).tolist())):
        if len(columns):
            yield from ((row, part) for part in columns.split(step))
