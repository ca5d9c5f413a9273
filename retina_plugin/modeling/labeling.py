"""From ground truth to dense targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retina_plugin.errors import ConfigError
from retina_plugin.losses.dense import DenseTargets

__all__ = ["AnchorLabeler"]


class AnchorLabeler:
    """Turn each image's boxes and classes into :class:`DenseTargets`.

    Args:
        matcher: ``matcher(gt_boxes_G4, anchors_R4)`` -> matched box and label of each anchor,
            an :class:`~retina_plugin.modeling.matcher.AnchorMatcher` or one of your own.
        num_classes: K; ground-truth classes lie in [0, K).
    """

    def __init__(self, matcher: Callable[[Tensor, Tensor], tuple], num_classes: int) -> None:
        self.matcher = matcher
        self.num_classes = num_classes

    @torch.no_grad()
    def __call__(
        self, anchors_R4: Tensor, gt_boxes: Sequence[Tensor], gt_classes: Sequence[Tensor]
    ) -> DenseTargets:
        """Label a batch.

        Args:
            anchors_R4: all levels' anchors, XYXY in pixels of the network's input.
            gt_boxes: N tensors (G, 4) in the same frame; G may be 0.
            gt_classes: N tensors (G,) int64.

        Raises:
            ConfigError: a class outside [0, K): ``NUM_CLASSES`` does not fit the dataset.
        """
        positives, ignored = [], []
        for boxes, classes in zip(gt_boxes, gt_classes):
            self._check_classes(classes)
            gt_R, label_R = self.matcher(boxes, anchors_R4)
            (anchor,) = torch.where(label_R == 1)
            gt = gt_R[anchor]
            positives.append((anchor, classes[gt], boxes[gt].to(anchors_R4.dtype)))
            ignored.append(torch.where(label_R == -1)[0])
        anchor, classes_P, boxes_P4 = (torch.cat(parts) for parts in zip(*positives))
        return DenseTargets(
            num_images=len(gt_boxes),
            positive_image=_image_index([p[0] for p in positives]),
            positive_anchor=anchor,
            positive_class=classes_P,
            positive_gt_box=boxes_P4,
            ignored_image=_image_index(ignored),
            ignored_anchor=torch.cat(ignored),
        )

    def _check_classes(self, classes: Tensor) -> None:
        # On an accelerator the comparison would stall every step; an index error tells there too.
        if classes.device.type == "cpu" and len(classes):
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= self.num_classes:
                raise ConfigError(
                    f"ground-truth class {high if high >= self.num_classes else low} is outside "
                    f"[0, {self.num_classes}): set MODEL.RETINANET.NUM_CLASSES to the dataset's"
                )


def _image_index(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full_like(p, n) for n, p in enumerate(parts)])
