"""From ground truth to dense targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import BACKGROUND, IGNORED, DenseTargets

__all__ = ["AnchorLabeler"]


class AnchorLabeler:
    """Turn each image's boxes and classes into :class:`DenseTargets`.

    Args:
        matcher: ``matcher(gt_boxes_G4, anchors_R4)`` -> matched box and label of each anchor,
            an :class:`~retina_plugin.modeling.matcher.AnchorMatcher` or one of your own; without
            boxes it may call no anchor positive.
        num_classes: K; ground-truth classes lie in [0, K).
        ignore_iof_thresh: in (0, 1]. A background anchor of which at least this share lies in one
            crowd box is ignored: IoF = intersection / anchor's area, which is the IoU with a crowd
            of COCO's evaluation. None: crowd boxes are not looked at, as in Detectron2.

    Raises:
        ConfigError: ``ignore_iof_thresh`` outside (0, 1].
    """

    def __init__(
        self,
        matcher: Callable[[Tensor, Tensor], tuple],
        num_classes: int,
        ignore_iof_thresh: float | None = None,
    ) -> None:
        if ignore_iof_thresh is not None and not 0 < ignore_iof_thresh <= 1:
            raise ConfigError(
                f"MODEL.RETINANET.IGNORE_IOF_THRESH must lie in (0, 1] or be None, "
                f"got {ignore_iof_thresh}"
            )
        self.matcher = matcher
        self.num_classes = num_classes
        self.ignore_iof_thresh = ignore_iof_thresh

    @torch.no_grad()
    def __call__(
        self,
        anchors_R4: Tensor,
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
        ignore_boxes: Sequence[Tensor] | None = None,
    ) -> DenseTargets:
        """Label a batch. Nothing waits for an accelerator, if the matcher does not.

        Args:
            anchors_R4: all levels' anchors, XYXY in pixels of the network's input.
            gt_boxes: N tensors (G, 4) in the same frame; G may be 0.
            gt_classes: N tensors (G,) int64.
            ignore_boxes: N tensors (C, 4) of crowd boxes in the same frame; C may be 0.

        Raises:
            ConfigError: a class outside [0, K): ``NUM_CLASSES`` does not fit the dataset. On an
                accelerator an assertion of the device.
        """
        shape = (len(gt_boxes), len(anchors_R4))
        label_NR = torch.empty(shape, dtype=torch.int16, device=anchors_R4.device)
        gt_NR = torch.empty_like(label_NR, dtype=torch.int64)
        first = 0
        for n, (boxes, classes) in enumerate(zip(gt_boxes, gt_classes, strict=True)):
            self._check_classes(classes)
            gt_R, label_R = self.matcher(boxes, anchors_R4)
            # of what is not positive a matcher may name any box, or none
            gt_R = gt_R.long().clamp(0, max(len(boxes) - 1, 0))
            torch.add(gt_R, first, out=gt_NR[n])  # boxes are counted through the batch
            label_NR[n] = torch.where(label_R == -1, IGNORED, BACKGROUND)
            if len(boxes):
                label_NR[n] = torch.where(label_R == 1, classes.short()[gt_R], label_NR[n])
            first += len(boxes)
        if self.ignore_iof_thresh is not None and ignore_boxes is not None:
            for label_R, boxes in zip(label_NR, ignore_boxes, strict=True):
                covered_R = _covered(anchors_R4, boxes, self.ignore_iof_thresh)
                label_R.masked_fill_(covered_R & (label_R == BACKGROUND), IGNORED)
        return DenseTargets(label_NR, gt_NR, torch.cat(list(gt_boxes)).to(anchors_R4.dtype))

    def _check_classes(self, classes: Tensor) -> None:
        inside = ((classes >= 0) & (classes < self.num_classes)).all()
        hint = f"[0, {self.num_classes}): set MODEL.RETINANET.NUM_CLASSES to the dataset's"
        if classes.device.type != "cpu":
            torch._assert_async(inside, f"a ground-truth class is outside {hint}")
        elif not inside:
            wrong = next(c for c in classes.tolist() if not 0 <= c < self.num_classes)
            raise ConfigError(f"ground-truth class {wrong} is outside {hint}")


def _covered(anchors_R4: Tensor, boxes_C4: Tensor, thresh: float) -> Tensor:
    """(R,) bool: one of the boxes holds at least ``thresh`` of the anchor's area, if it has any.

    A box at a time, as images have few crowds: extra memory is a few times (R,).
    """
    # coordinates contiguous and comparisons to floats, 0 or 1: the CPU vectorises both
    ax1, ay1, ax2, ay2 = torch.stack(anchors_R4.unbind(dim=1))
    area_R = (ax2 - ax1).mul_(ay2 - ay1)
    covered_R = torch.zeros_like(area_R)
    for x1, y1, x2, y2 in boxes_C4:
        width = torch.min(x2, ax2).sub_(torch.max(x1, ax1)).clamp_(min=0)
        height = torch.min(y2, ay2).sub_(torch.max(y1, ay1)).clamp_(min=0)
        # NaN without area, for which >= is False
        covered_R.add_(width.mul_(height).div_(area_R).ge_(thresh))
    return covered_R > 0
