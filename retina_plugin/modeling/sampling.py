"""The anchors that the classification loss sees, chosen by ``MODEL.RETINANET.SAMPLER``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor
from torchvision.ops import box_iou, nms

from retina_plugin.errors import ConfigError
from retina_plugin.losses import DenseTargets
from retina_plugin.registry import ComponentRegistry

from .contracts import Sample

__all__ = ["ANCHOR_SAMPLER_REGISTRY", "OHEM", "AllAnchors"]

# Entries are classes whose instances are a `contracts.Sampler`.
ANCHOR_SAMPLER_REGISTRY = ComponentRegistry("MODEL.RETINANET.SAMPLER")

# Anchors that the NMS adds at a time, and survivors that it compares them with at a time: these
# bound its memory and do not change its result.
_BLOCK = 1024
_SURVIVORS = 8192


@ANCHOR_SAMPLER_REGISTRY.register()
class AllAnchors:
    """No sampling: "the focal loss is applied to all ~100k anchors in each sampled image" (section
    4.1, "Focal Loss"), except ignored ones."""

    def __call__(
        self,
        targets: DenseTargets,
        score_anchors: Callable[[], Tensor],
        predict_boxes: Callable[[int, Tensor], Tensor],
    ) -> None:
        """None, which means every anchor that is not ignored (see ``contracts.Sampler``)."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {}


@ANCHOR_SAMPLER_REGISTRY.register()
class OHEM:
    """Online hard example mining (section 5.1; Shrivastava et al., CVPR 2016).

    In each image every anchor is scored by its loss. Class-agnostic NMS of the predicted boxes
    drops the lower-scored of two anchors whose boxes overlap, and the ``batch_size`` highest-scored
    of the rest are chosen. With ``positive_fraction`` .25 ("OHEM 1:3", as in SSD) at most a quarter
    of them are positives, the hardest ones; the hardest negatives fill the batch.

    The NMS goes through the anchors in blocks, highest scores first, and stops when the batch is
    full. An anchor can only be dropped by one with a higher score. So stopping early gives the
    result of one NMS over all anchors, in bounded memory.

    Args:
        batch_size: anchors of an image that are chosen (``OHEM.BATCH_SIZE``; Table 1d: 128, 256,
            512).
        nms_thresh: IoU above which the lower-scored anchor is dropped (``OHEM.NMS_THRESH``; .5 or
            .7).
        positive_fraction: largest share of positives (``OHEM.POSITIVE_FRACTION``); None for any.

    Raises:
        ConfigError: a setting outside its range.
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
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
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
        """The hard anchors, see :class:`~retina_plugin.modeling.contracts.Sampler`."""
        score_NR = score_anchors()
        is_positive_NR = targets.label_NR >= 0
        chosen = [
            self._choose(score_R, is_positive_R, partial(predict_boxes, n))
            for n, (score_R, is_positive_R) in enumerate(zip(score_NR, is_positive_NR))
        ]
        image = torch.cat([torch.full_like(c, n) for n, c in enumerate(chosen)])
        return Sample(image, torch.cat(chosen))

    def _choose(
        self, score_R: Tensor, is_positive_R: Tensor, predict_boxes: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The chosen anchors of one image, hardest first."""
        order = score_R.argsort(descending=True, stable=True)
        order = order[score_R[order] > -torch.inf]
        positives_left = int(is_positive_R[order].sum())
        chosen = kept = order[:0]
        kept_boxes = predict_boxes(kept)
        # torchvision's NMS compares in double precision, a tensor of float32 would in float32: an
        # IoU of .3 is above the threshold .3 there, and not here. (NaN, of two boxes without area,
        # is above none.)
        threshold = _float32_below(self.nms_thresh)
        for block in order.split(_BLOCK):
            positives_left -= int(is_positive_R[block].sum())
            boxes = predict_boxes(block)
            survives = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
            for survivor_boxes in kept_boxes.split(_SURVIVORS):
                survives &= ~(box_iou(boxes, survivor_boxes) > threshold).any(dim=1)
            block, boxes = block[survives], boxes[survives]
            # rank instead of score: the NMS then keeps the order of equal scores
            rank = torch.arange(len(block), 0, -1, device=boxes.device, dtype=boxes.dtype)
            survivors = nms(boxes, rank, self.nms_thresh)
            kept = torch.cat([kept, block[survivors]])
            kept_boxes = torch.cat([kept_boxes, boxes[survivors]])
            chosen, complete = self._pick(kept, is_positive_R[kept], positives_left)
            if complete:
                break
        return chosen

    def _pick(self, kept: Tensor, is_positive: Tensor, positives_left: int) -> tuple[Tensor, bool]:
        """The batch from the survivors so far, and whether it is final."""
        if self.positive_fraction is None:
            chosen = kept[: self.batch_size]
            return chosen, len(chosen) == self.batch_size
        max_positives = int(self.batch_size * self.positive_fraction)
        positives = kept[is_positive][:max_positives]
        negatives = kept[~is_positive][: self.batch_size - len(positives)]
        chosen = torch.cat([positives, negatives])
        # a positive of a lower score would still replace a negative
        positives_final = len(positives) == max_positives or positives_left == 0
        return chosen, positives_final and len(chosen) == self.batch_size


def _float32_below(value: float) -> float:
    """The largest float32 that is at most ``value``: every float32 is above both or neither."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-1)))
