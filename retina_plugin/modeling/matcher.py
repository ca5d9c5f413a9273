"""Exact anchor matching in bounded memory.

Detectron2 builds the whole G x R matrix of IoUs and several copies of it (gigabytes for crowded
images); here a few ground-truth boxes at a time meet all anchors, with the same result to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retina_plugin.errors import ConfigError

__all__ = ["LOW_QUALITY_MATCHES", "AnchorMatcher", "Matches"]

LOW_QUALITY_MATCHES = ("always", "above_background", "never")

# IoUs computed at a time: bounds the temporaries to a few times 4 MB.
_CHUNK = 1 << 20


class Matches(NamedTuple):
    """One image's result; both (R,)."""

    gt: Tensor  # int64 index of the ground-truth box with the highest IoU, the first if equal
    label: Tensor  # int8: 1 positive, 0 background, -1 ignored


class AnchorMatcher:
    """Assign each anchor to the ground-truth box it overlaps most (section 4, "Anchors").

    Args:
        thresholds: increasing IoUs that split [0, 1]; the paper's are (.4, .5).
        labels: one more than thresholds, the label of each interval (0 background, -1 ignored,
            1 positive); an IoU at a threshold belongs to the interval above. The paper's are
            (0, -1, 1).
        low_quality: which anchors with the highest IoU of some box become positive although
            that IoU is low. "always" (Detectron2); "above_background" (Detectron: only where the
            anchor's own best IoU is not below the first threshold); "never".
            A box that no anchor touches promotes none (in Detectron2 it promotes all).

    Raises:
        ConfigError: thresholds not increasing or positive, labels of another number or value,
            an unknown ``low_quality``.
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
        if low_quality not in LOW_QUALITY_MATCHES:
            raise ConfigError(
                f"LOW_QUALITY_MATCHES: no '{low_quality}'; known: {', '.join(LOW_QUALITY_MATCHES)}"
            )
        self.thresholds, self.labels, self.low_quality = thresholds, labels, low_quality

    @torch.no_grad()
    def __call__(self, gt_boxes_G4: Tensor, anchors_R4: Tensor) -> Matches:
        """Match one image's boxes, XYXY in pixels, G may be 0.

        Returns:
            The same labels and indices as Detectron2's ``Matcher`` on ``pairwise_iou``, but for
            boxes that no anchor touches.
        """
        R = len(anchors_R4)
        # IoU 0 with the first box is what an untouched anchor has
        best_iou_R = anchors_R4.new_zeros(R)
        best_gt_R = torch.zeros(R, dtype=torch.int64, device=anchors_R4.device)
        promoted_R = torch.zeros(R, dtype=torch.bool, device=anchors_R4.device)
        columns = anchors_R4.unbind(dim=1)
        area_R = (columns[2] - columns[0]) * (columns[3] - columns[1])
        step = max(1, _CHUNK // max(R, 1))
        for first, gt in zip(range(0, len(gt_boxes_G4), step), gt_boxes_G4.split(step)):
            iou_gR = _pairwise_iou(gt, columns, area_R)
            iou_R, index_R = iou_gR.max(dim=0)
            better = iou_R > best_iou_R  # strictly: among equals the first box stays
            best_gt_R = torch.where(better, index_R + first, best_gt_R)
            best_iou_R = torch.where(better, iou_R, best_iou_R)
            if self.low_quality != "never" and R:
                highest_g1 = iou_gR.amax(dim=1, keepdim=True)
                promoted_R |= ((iou_gR == highest_g1) & (highest_g1 > 0)).any(dim=0)
        interval_R = torch.bucketize(
            best_iou_R, best_iou_R.new_tensor(self.thresholds), right=True
        )  # right: thresholds[i-1] <= IoU < thresholds[i]
        label_R = torch.tensor(self.labels, dtype=torch.int8, device=interval_R.device)[interval_R]
        if self.low_quality == "above_background":
            promoted_R &= best_iou_R >= self.thresholds[0]
        label_R[promoted_R] = 1
        return Matches(best_gt_R, label_R)


def _pairwise_iou(gt_g4: Tensor, columns: Sequence[Tensor], area_R: Tensor) -> Tensor:
    """(g, R) IoU, in the operations and the order of ``detectron2.structures.pairwise_iou``."""
    x1, y1, x2, y2 = (c[:, None] for c in gt_g4.unbind(dim=1))
    width = (torch.min(x2, columns[2]) - torch.max(x1, columns[0])).clamp_(min=0)
    height = (torch.min(y2, columns[3]) - torch.max(y1, columns[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (x2 - x1) * (y2 - y1) + area_R - intersection
    # boxes without area may have union 0: their IoU is 0, not NaN
    return torch.where(intersection > 0, intersection / union, 0.0)
