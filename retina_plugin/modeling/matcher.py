"""Exact anchor matching in bounded memory.

Detectron2 builds the whole G x R matrix of IoUs and several copies of it (gigabytes for crowded
images). Here a piece of the anchors meets the boxes that can touch it, with the same result to
the bit: a box outside the piece's bounding box has IoU 0 with each of its anchors. Comparisons
write floats, 0 or 1: on the CPU PyTorch vectorises them then, while comparisons to bool, ``max``
with indices and masked fills cost it 5 to 30 times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_plugin.errors import ConfigError

__all__ = ["LOW_QUALITY_MATCHES", "AnchorMatcher", "Matches"]

LOW_QUALITY_MATCHES = ("always", "above_background", "never")

# IoUs computed at a time on the CPU, twice as many at most: their three temporaries stay in or near
# a core's cache.
_IOUS = 1 << 18
# Anchors of a piece at least and at most: short pieces miss more boxes, long ones take fewer calls.
_SHORTEST, _LONGEST = 1 << 12, 1 << 13
# On an accelerator boxes meet all anchors, as choosing boxes would stall it; this only bounds the
# memory, to four temporaries of 32 MB.
_IOUS_ON_ACCELERATOR = 1 << 23

# More boxes than an image has; whole numbers up to it are exact in float32.
_MANY = 1 << 24


class Matches(NamedTuple):
    """One image's result; both (R,)."""

    gt: Tensor  # int64 index of the ground-truth box with the highest IoU, the first if equal
    label: Tensor  # int8: 1 positive, 0 background, -1 ignored


class AnchorMatcher:
    """Assign each anchor to the ground-truth box it overlaps most (section 4, "Anchors").

    Args:
        thresholds: increasing IoUs that split [0, 1]; the paper's are (.4, .5).
        labels: one more than thresholds, the label of each interval (0 background, -1 ignored,
            1 positive); an IoU at a threshold belongs to the interval above. The first is that of
            anchors that no box touches, so not 1. The paper's are (0, -1, 1).
        low_quality: which anchors with the highest IoU of some box become positive although
            that IoU is low. "always" (Detectron2); "above_background" (Detectron: only where the
            anchor's own best IoU is not below the first threshold); "never".
            A box that no anchor touches promotes none (in Detectron2 it promotes all).

    Raises:
        ConfigError: thresholds not increasing or positive, labels of another number or value,
            a positive first label, an unknown ``low_quality``.
    """

    def __init__(
        self, thresholds: Sequence[float], labels: Sequence[int], low_quality: str = "always"
    ) -> None:
        thresholds, labels = list(thresholds), list(labels)
        if not thresholds or thresholds[0] <= 0 or thresholds != sorted(thresholds):
            raise ConfigError(f"IOU_THRESHOLDS must be positive and increasing, got {thresholds}")
        if len(labels) != len(thresholds) + 1 or not set(labels) <= {-1, 0, 1}:
            raise ConfigError(
                f"IOU_LABELS must be {len(thresholds) + 1} of -1, 0, 1 "
                f"for IOU_THRESHOLDS {thresholds}, got {labels}"
            )
        if labels[0] == 1:
            raise ConfigError(
                f"IOU_LABELS: the first is that of anchors that no box touches, so it can't be 1 "
                f"(positive), got {labels}"
            )
        if low_quality not in LOW_QUALITY_MATCHES:
            raise ConfigError(
                f"LOW_QUALITY_MATCHES: no '{low_quality}'; known: {', '.join(LOW_QUALITY_MATCHES)}"
            )
        self.thresholds, self.labels, self.low_quality = thresholds, labels, low_quality

    @torch.no_grad()
    def __call__(self, gt_boxes_G4: Tensor, anchors_R4: Tensor) -> Matches:
        """Match one image's boxes, XYXY in pixels, float32 or float64; G and R may be 0.

        Any finite anchors and any boxes; a box that is not finite, is turned inside out or has no
        area touches no anchor. On an accelerator nothing waits for the device.

        Returns:
            The same labels and indices as Detectron2's ``Matcher`` on ``pairwise_iou``, but for
            boxes that no anchor touches.
        """
        gt = _Boxes.of(gt_boxes_G4)
        # each coordinate contiguous; ``t().contiguous()`` takes the CPU 4 times as long
        corners_4R = torch.stack(anchors_R4.unbind(dim=1))
        gt_R = corners_4R.new_zeros(len(anchors_R4), dtype=torch.int64)
        label_R = torch.full_like(gt_R, self.labels[0], dtype=torch.int8)
        if len(gt_boxes_G4) and len(anchors_R4):
            match = _match_touching if anchors_R4.device.type == "cpu" else _match_all
            for anchors, places in match(gt, corners_4R, promote=self.low_quality != "never"):
                sizes = [place.stop - place.start for place in places]
                labels = self._label(anchors.iou_R, anchors.promoted_R).split(sizes)
                for place, index, label in zip(places, anchors.gt_R.split(sizes), labels):
                    gt_R[place], label_R[place] = index, label
        return Matches(gt_R, label_R)

    def _label(self, iou_R: Tensor, promoted_R: Tensor) -> Tensor:
        label_R = torch.full_like(iou_R, self.labels[0])
        at_least_R = torch.empty_like(label_R)  # 1 or 0
        for threshold, below, above in zip(self.thresholds, self.labels, self.labels[1:]):
            torch.ge(iou_R, threshold, out=at_least_R)
            label_R.add_(at_least_R, alpha=above - below)
        if self.low_quality == "above_background":
            promoted_R = promoted_R.mul_(torch.ge(iou_R, self.thresholds[0], out=at_least_R))
        # makes 1 of -1, 0 and 1
        return label_R.add_(promoted_R, alpha=2).clamp_(max=1)


class _Boxes(NamedTuple):
    """G ground-truth boxes."""

    corners_G4: Tensor
    area_G: Tensor  # infinite where a box has none, which makes its IoUs 0 instead of NaN
    index_G: Tensor  # 0 .. G - 1, minus _MANY: below 0, and least for the first box

    @classmethod
    def of(cls, corners_G4: Tensor) -> _Boxes:
        x1, y1, x2, y2 = corners_G4.unbind(dim=1)
        area_G = (x2 - x1) * (y2 - y1)
        touchable_G = (x2 > x1) & (y2 > y1) & (area_G > 0)  # False for NaN
        return cls(
            corners_G4.masked_fill(~touchable_G[:, None], 0),
            area_G.masked_fill(~touchable_G, torch.inf),
            torch.arange(len(area_G), dtype=area_G.dtype, device=area_G.device) - _MANY,
        )

    def take(self, index: Tensor) -> _Boxes:
        return _Boxes(*(x[index] for x in self))

    def split(self, size: int) -> Iterator[_Boxes]:
        return map(_Boxes, *(x.split(size) for x in self))


class _Anchors(NamedTuple):
    """Some anchors, and what is known of them so far: floats, which are updated in place."""

    corners_4R: Tensor
    area_R: Tensor
    iou_R: Tensor  # the highest
    gt_R: Tensor  # index of the box that has it, 0 if that is 0
    promoted_R: Tensor  # 1 where the anchor has the highest IoU of some box, else 0

    @classmethod
    def of(cls, corners_4R: Tensor, gt: _Boxes) -> _Anchors:
        x1, y1, x2, y2 = corners_4R
        # anchors turned inside out have no area either
        area_R = (x2 - x1).mul_(y2 - y1).clamp_(min=0)
        dtype = torch.promote_types(corners_4R.dtype, gt.area_G.dtype)
        return cls(corners_4R, area_R, *area_R.new_zeros((3, len(area_R)), dtype=dtype))

    def iou(self, gt: _Boxes) -> Tensor:
        """(g, R) IoU, or a number below 0 instead of 0.

        The operations that a positive IoU depends on, and their order, are those of
        ``detectron2.structures.pairwise_iou``; no union is 0, so that it needs no others.
        """
        x1, y1, x2, y2 = (c[:, None] for c in gt.corners_G4.unbind(dim=1))
        ax1, ay1, ax2, ay2 = self.corners_4R
        # one of an intersection's two sides may be negative, not both
        width = torch.min(x2, ax2).sub_(torch.max(x1, ax1)).clamp_(min=0)
        height = torch.min(y2, ay2).sub_(torch.max(y1, ay1))
        intersection = width.mul_(height)
        union = torch.add(gt.area_G[:, None], self.area_R, out=height).sub_(intersection)
        return intersection.div_(union)

    def update(self, iou_gR: Tensor, gt: _Boxes) -> None:
        """See some more boxes, which come after those seen. Overwrites ``iou_gR``."""
        if len(iou_gR) == 1:
            iou_R, index_R = iou_gR[0], gt.index_G
        else:
            iou_R = iou_gR.amax(dim=0)
            index_R = iou_gR.eq_(iou_R).mul_(gt.index_G[:, None]).amin(dim=0)
        # strictly: among equals the first box stays
        better_R = torch.gt(iou_R, self.iou_R, out=torch.empty_like(iou_R))
        self.gt_R.lerp_(index_R + _MANY, better_R)
        torch.max(self.iou_R, iou_R, out=self.iou_R)

    def promote(self, iou_gR: Tensor, highest_g1: Tensor) -> None:
        """Mark the anchors that have the highest IoU of a box, unless that is 0."""
        at_highest_gR = torch.eq(iou_gR, highest_g1, out=torch.empty_like(iou_gR))
        at_highest_gR.mul_(highest_g1 > 0)
        torch.max(self.promoted_R, at_highest_gR.amax(dim=0), out=self.promoted_R)


class _Matched(NamedTuple):
    """Anchors that have seen all boxes, and where they are among the image's, part by part."""

    anchors: _Anchors
    places: list[slice]


def _match_all(gt: _Boxes, corners_4R: Tensor, promote: bool) -> list[_Matched]:
    """Some boxes at a time with all anchors; nothing waits for the device."""
    anchors = _Anchors.of(corners_4R, gt)
    for some in gt.split(max(1, _IOUS_ON_ACCELERATOR // len(anchors.area_R))):
        iou_gR = anchors.iou(some)
        if promote:
            anchors.promote(iou_gR, iou_gR.amax(dim=1, keepdim=True))
        anchors.update(iou_gR, some)
    return [_Matched(anchors, [slice(0, len(anchors.area_R))])]


def _match_touching(gt: _Boxes, corners_4R: Tensor, promote: bool) -> list[_Matched]:
    """A piece of the anchors at a time with the boxes that touch its bounding box, if any do."""
    G, R = len(gt.area_G), corners_4R.shape[1]
    length = min(max(_IOUS // G, _SHORTEST), _LONGEST)
    touching_BG = _touching(gt, corners_4R, length)
    touched = touching_BG.any(dim=1).nonzero().flatten().tolist()
    places = {b: slice(b * length, min((b + 1) * length, R)) for b in touched}
    if 0 < G * len(touched) * length <= 2 * _IOUS:
        # few boxes: fewer calls are worth more than the boxes that a piece could leave out
        merged = torch.cat([corners_4R[:, place] for place in places.values()], dim=1)
        return [_Matched(_match_all(gt, merged, promote)[0].anchors, list(places.values()))]
    step = max(1, _IOUS // length)
    pieces = {b: _Anchors.of(corners_4R[:, place], gt) for b, place in places.items()}
    dtype = torch.promote_types(corners_4R.dtype, gt.area_G.dtype)
    highest_BG = torch.zeros_like(touching_BG, dtype=dtype)
    for b, index in _rows(touching_BG, step):
        some = gt.take(index)
        iou_gR = pieces[b].iou(some)
        if promote:
            highest_BG[b, index] = iou_gR.amax(dim=1)
        pieces[b].update(iou_gR, some)
    if promote:
        # only now the highest IoU of a box is known: see again the few pieces that have it
        highest_G = highest_BG.amax(dim=0)
        for b, index in _rows((highest_BG == highest_G) & (highest_G > 0), step):
            pieces[b].promote(pieces[b].iou(gt.take(index)), highest_G[index, None])
    return [_Matched(anchors, [places[b]]) for b, anchors in pieces.items()]


def _touching(gt: _Boxes, corners_4R: Tensor, length: int) -> Tensor:
    """(B, G) bool: the box overlaps the bounding box of the piece, all but the last so long."""
    whole = corners_4R.shape[1] // length * length
    parts = [corners_4R[:, :whole].unflatten(1, (-1, length)), corners_4R[:, None, whole:]]
    parts = [part for part in parts if part.numel()]
    low_2B = torch.cat([part[:2].amin(dim=2) for part in parts], dim=1)
    high_2B = torch.cat([part[2:].amax(dim=2) for part in parts], dim=1)
    below_2BG = gt.corners_G4.t()[:2, None] < high_2B[:, :, None]
    above_2BG = gt.corners_G4.t()[2:, None] > low_2B[:, :, None]
    return (below_2BG & above_2BG).all(dim=0)


def _rows(chosen_BG: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """Each row with the indices of its columns that are chosen, ``step`` at a time, in order."""
    _, column = chosen_BG.nonzero(as_tuple=True)
    for row, columns in enumerate(column.split(chosen_BG.sum(dim=1).tolist())):
        if len(columns):
            yield from ((row, some) for some in columns.split(step))
