"""From ground truth to dense targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import BACKGROUND, IGNORED, DenseTargets

from .contracts import Matcher
from .transfer import to_device

__all__ = ["AnchorLabeler"]


class AnchorLabeler:
    """Turn the ground truth of a batch into :class:`DenseTargets`.

    Crowd boxes (``gt_iscrowd``) are not objects: the matcher does not see them, and their class is
    not used. In an image without objects all anchors are background.

    Args:
        matcher: finds the box of each anchor,
            :class:`~retina_plugin.modeling.matcher.AnchorMatcher` or your own
            :class:`~retina_plugin.modeling.contracts.Matcher`.
        num_classes: K; ground-truth classes lie in [0, K).
        ignore_iof_thresh: in (0, 1]. A background anchor is ignored if at least this share of its
            area lies in one crowd box: IoF = intersection / area of the anchor, which is what
            COCO's evaluation uses for crowds. None: anchors in crowds are background, as in
            Detectron2.

    Raises:
        ConfigError: ``ignore_iof_thresh`` is outside (0, 1].
    """

    def __init__(
        self, matcher: Matcher, num_classes: int, ignore_iof_thresh: float | None = None
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
    def __call__(self, anchors_R4: Tensor, gt_instances: Sequence[Instances]) -> DenseTargets:
        """Label a batch, without GPU synchronisation if the matcher has none.

        Args:
            anchors_R4: anchors of all levels, XYXY in pixels of the network's input.
            gt_instances: N Instances with ``gt_boxes`` in the same frame, ``gt_classes`` (int64)
                and, if the mapper keeps crowds, ``gt_iscrowd`` (bool). On a GPU ``gt_iscrowd``
                should still lie on the host: reading it elsewhere synchronises.

        Raises:
            ConfigError: a class is outside [0, K), so ``NUM_CLASSES`` does not fit the dataset (on
                a GPU a device-side assertion); ``IGNORE_IOF_THRESH`` is set and an image has no
                ``gt_iscrowd``; a matcher of your own gives Detectron2's labels (found on the CPU).
        """
        shape = (len(gt_instances), len(anchors_R4))
        label_NR = torch.empty(shape, dtype=torch.int16, device=anchors_R4.device)
        gt_NR = torch.empty_like(label_NR, dtype=torch.int64)
        boxes, num_boxes = [], 0
        for n, instances in enumerate(gt_instances):
            gt_boxes_G4, classes_G, crowds_C4 = self._split_crowds(instances)
            self._check_classes(classes_G)
            gt_R, label_R = self.matcher(gt_boxes_G4, anchors_R4)
            self._check_matches(label_R)
            # A matcher may give any index for an anchor that is not positive. Clamp it, because
            # `classes_G[gt_R]` reads all of them.
            gt_R = gt_R.long().clamp(0, max(len(gt_boxes_G4) - 1, 0))
            if len(gt_boxes_G4):
                label_NR[n] = torch.where(label_R >= 0, classes_G.short()[gt_R], label_R)
            else:
                # As in Detectron2, whatever the label of the lowest interval. Anchors in crowds
                # follow below.
                label_NR[n] = BACKGROUND
            if self.ignore_iof_thresh is not None:
                covered_R = _covered(anchors_R4, crowds_C4, self.ignore_iof_thresh)
                label_NR[n].masked_fill_(covered_R & (label_NR[n] == BACKGROUND), IGNORED)
            torch.add(gt_R, num_boxes, out=gt_NR[n])  # an index into the boxes of all images
            boxes.append(gt_boxes_G4)
            num_boxes += len(gt_boxes_G4)
        return DenseTargets(label_NR, gt_NR, torch.cat(boxes).to(anchors_R4.dtype))

    def _split_crowds(self, instances: Instances) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (G, 4) and classes (G,) of the objects, boxes (C, 4) of the crowds."""
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        if not instances.has("gt_iscrowd"):
            if self.ignore_iof_thresh is not None:
                raise ConfigError(
                    "MODEL.RETINANET.IGNORE_IOF_THRESH needs the field gt_iscrowd of each image's "
                    "instances: set INPUT.MAPPER FastMapper, add the field in your own mapper, or "
                    "set the key to None"
                )
            return boxes, classes, boxes[:0]
        # select by indices made on the host: selecting by a mask on a GPU would synchronise
        is_crowd = instances.gt_iscrowd.tolist()
        if not any(is_crowd):
            return boxes, classes, boxes[:0]
        objects, crowds = (
            to_device(torch.tensor(index, dtype=torch.int64), boxes.device)
            for index in (
                [i for i, crowd in enumerate(is_crowd) if not crowd],
                [i for i, crowd in enumerate(is_crowd) if crowd],
            )
        )
        return boxes[objects], classes[objects], boxes[crowds]

    def _check_matches(self, label_R: Tensor) -> None:
        """Find a matcher with Detectron2's labels, whose 0 is background and not a match."""
        if label_R.device.type == "cpu" and label_R.numel() and int(label_R.max()) > 0:
            raise ConfigError(
                f"the matcher gives label {int(label_R.max())}: return 0 for a matched anchor, "
                f"{BACKGROUND} (BACKGROUND) or {IGNORED} (IGNORED)"
            )

    def _check_classes(self, classes_G: Tensor) -> None:
        inside = ((classes_G >= 0) & (classes_G < self.num_classes)).all()
        hint = f"[0, {self.num_classes}): set MODEL.RETINANET.NUM_CLASSES to the dataset's"
        if classes_G.device.type != "cpu":
            torch._assert_async(inside, f"a ground-truth class is outside {hint}")
        elif not inside:
            wrong = next(c for c in classes_G.tolist() if not 0 <= c < self.num_classes)
            raise ConfigError(f"ground-truth class {wrong} is outside {hint}")


def _covered(anchors_R4: Tensor, boxes_C4: Tensor, thresh: float) -> Tensor:
    """(R,) bool: at least ``thresh`` of the anchor's area lies in one of the boxes.

    False for an anchor without area. One box at a time, because images have few crowds: the extra
    memory is a few times (R,).
    """
    # contiguous coordinates, and comparisons that give floats 0 or 1: the CPU vectorises both
    ax1, ay1, ax2, ay2 = torch.stack(anchors_R4.unbind(dim=1))
    area_R = (ax2 - ax1).mul_(ay2 - ay1)
    covered_R = torch.zeros_like(area_R)
    for x1, y1, x2, y2 in boxes_C4:
        width = torch.min(x2, ax2).sub_(torch.max(x1, ax1)).clamp_(min=0)
        height = torch.min(y2, ay2).sub_(torch.max(y1, ay1)).clamp_(min=0)
        # an anchor without area gives 0 / 0 = NaN, for which >= is False
        covered_R.add_(width.mul_(height).div_(area_R).ge_(thresh))
    return covered_R > 0
