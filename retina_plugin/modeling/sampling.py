"""Which anchors the classification loss sees, chosen by ``MODEL.RETINANET.SAMPLER``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from retina_plugin.errors import ConfigError
from retina_plugin.losses import DenseTargets
from retina_plugin.registry import ComponentRegistry

__all__ = ["ANCHOR_SAMPLER_REGISTRY", "OHEM", "AllAnchors", "Sample"]

# Entries are called with (targets, score_anchors, predict_boxes), see OHEM, and return the Sample
# that the classification loss is computed on, or None for every anchor that is not ignored.
ANCHOR_SAMPLER_REGISTRY = ComponentRegistry("MODEL.RETINANET.SAMPLER")

# Candidates, and survivors, that the NMS compares together: bound its memory, not its result.
_BLOCK = 1024
_SURVIVORS = 8192


class Sample(NamedTuple):
    """The chosen anchors of a batch; both (S,) int64."""

    image: Tensor  # in [0, N)
    anchor: Tensor  # in [0, R)


@ANCHOR_SAMPLER_REGISTRY.register()
class AllAnchors:
    """Every anchor that is not ignored: "the focal loss is applied to all ~100k anchors in each
    sampled image" (section 4.1, "Focal Loss")."""

    def __call__(
        self,
        targets: DenseTargets,
        score_anchors: Callable[[], Tensor],
        predict_boxes: Callable[[int, Tensor], Tensor],
    ) -> None:
        """Choose none: the dense loss takes them all."""

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {}


@ANCHOR_SAMPLER_REGISTRY.register()
class OHEM:
    """Online hard example mining (section 5.1; Shrivastava et al., CVPR 2016).

    In each image every anchor is scored by its loss, class-agnostic NMS of the predicted boxes
    leaves the higher-scored of two that overlap, and the ``batch_size`` highest-scored ones stay.
    With ``positive_fraction`` .25 ("OHEM 1:3", as SSD does) at most a quarter of them are
    positives: the hardest of these, and the hardest negatives to fill up.

    The NMS runs over all anchors, but from the highest score down in blocks, and ends as soon as
    enough are left: lower-scored ones cannot change what is above them, so the result is that of
    one NMS over all anchors, in bounded memory.

    Where fewer positives are left than their share, negatives fill the batch up.

    Args:
        batch_size: anchors of an image that stay (``OHEM.BATCH_SIZE``; Table 1d: 128, 256, 512).
        nms_thresh: IoU above which the lower-scored goes (``OHEM.NMS_THRESH``; .5 or .7).
        positive_fraction: largest share of positives (``OHEM.POSITIVE_FRACTION``), None for any.

    Raises:
        ConfigError: an impossible setting.
    """

    def __init__(
        self, batch_size: int = 128, nms_thresh: float = 0.5, positive_fraction: float | None = None
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"MODEL.RETINANET.OHEM.BATCH_SIZE must be >= 1, got {batch_size}")
        if not 0.0 <= nms_thresh <= 1.0:
            raise ConfigError(
                f"MODEL.RETINANET.OHEM.NMS_THRESH must be in [0, 1], got {nms_thresh}"
            )
        if positive_fraction is not None and not 0.0 < positive_fraction <= 1.0:
            raise ConfigError(
                "MODEL.RETINANET.OHEM.POSITIVE_FRACTION must be in (0, 1] or None, "
                f"got {positive_fraction}"
            )
        self.batch_size = batch_size
        self.nms_thresh = nms_thresh
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        ohem = cfg.MODEL.RETINANET.OHEM
        return {
            "batch_size": ohem.BATCH_SIZE,
            "nms_thresh": ohem.NMS_THRESH,
            "positive_fraction": ohem.POSITIVE_FRACTION,
        }

    @torch.no_grad()
    def __call__(
        self,
        targets: DenseTargets,
        score_anchors: Callable[[], Tensor],
        predict_boxes: Callable[[int, Tensor], Tensor],
    ) -> Sample:
        """Choose the hard anchors.

        Args:
            targets: labels of the batch.
            score_anchors: () -> (N, R) loss of each anchor, summed over classes; -inf if ignored.
            predict_boxes: (image, (S,) anchors) -> (S, 4) decoded boxes, XYXY pixels.
        """
        score_NR = score_anchors()
        is_positive_NR = targets.label_NR >= 0
        chosen = [
            self._mine(score_R, is_positive_R, partial(predict_boxes, n))
            for n, (score_R, is_positive_R) in enumerate(zip(score_NR, is_positive_NR))
        ]
        image = torch.cat([torch.full_like(c, n) for n, c in enumerate(chosen)])
        return Sample(image, torch.cat(chosen))

    def _mine(
        self, score_R: Tensor, is_positive_R: Tensor, boxes_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The chosen anchors of one image, hardest first."""
        order = score_R.argsort(descending=True, stable=True)
        order = order[score_R[order] > -torch.inf]
        positives_left = int(is_positive_R[order].sum())
        chosen = kept = order[:0]
        kept_boxes = boxes_of(kept)
        for block in order.split(_BLOCK):
            positives_left -= int(is_positive_R[block].sum())
            boxes = boxes_of(block)
            free = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
            for some in kept_boxes.split(_SURVIVORS):
                free &= (box_iou(boxes, some) <= self.nms_thresh).all(dim=1)
            block, boxes = block[free], boxes[free]
            # the block is in the order of the scores, in which equal ones must stay
            rank = torch.arange(len(block), 0, -1, device=boxes.device, dtype=boxes.dtype)
            survivors = nms(boxes, rank, self.nms_thresh)
            kept = torch.cat([kept, block[survivors]])
            kept_boxes = torch.cat([kept_boxes, boxes[survivors]])
            chosen, complete = self._pick(kept, is_positive_R[kept], positives_left)
            if complete:
                break
        return chosen

    def _pick(self, kept: Tensor, is_positive: Tensor, positives_left: int) -> tuple[Tensor, bool]:
        """The batch from the survivors so far, and whether no lower-scored anchor can change it."""
        if self.positive_fraction is None:
            chosen = kept[: self.batch_size]
            return chosen, len(chosen) == self.batch_size
        most = int(self.batch_size * self.positive_fraction)
        positives = kept[is_positive][:most]
        negatives = kept[~is_positive][: self.batch_size - len(positives)]
        chosen = torch.cat([positives, negatives])
        settled = len(positives) == most or positives_left == 0
        return chosen, settled and len(chosen) == self.batch_size
