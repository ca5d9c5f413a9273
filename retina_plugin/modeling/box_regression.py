"""From predicted deltas to the sums of the box loss (section 4, "Box Regression Subnet")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from retina_plugin.losses import BoxLoss, DenseTargets

from .shapes import gather_anchors

__all__ = ["BoxTransform", "box_loss_sums", "encode"]


class BoxTransform(Box2BoxTransform):
    """Detectron2's, but for its check of the anchors, which waits for all that is queued."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """(P, 4) deltas from anchors to boxes, both (P, 4) XYXY: Detectron2's to the bit."""
        if src_boxes.device.type == "cpu":  # nothing to wait for
            return super().get_deltas(src_boxes, target_boxes)
        return encode(src_boxes, target_boxes, self.weights)


def encode(anchors_P4: Tensor, boxes_P4: Tensor, weights: Sequence[float]) -> Tensor:
    """(P, 4): the operations of ``Box2BoxTransform.get_deltas``, and their order."""
    deltas = []
    for axis in (0, 1):
        size = anchors_P4[:, axis + 2] - anchors_P4[:, axis]
        target_size = boxes_P4[:, axis + 2] - boxes_P4[:, axis]
        center = anchors_P4[:, axis] + 0.5 * size
        target_center = boxes_P4[:, axis] + 0.5 * target_size
        deltas.append(weights[axis] * (target_center - center) / size)
        deltas.append(weights[axis + 2] * torch.log(target_size / size))
    dx, dw, dy, dh = deltas
    return torch.stack((dx, dy, dw, dh), dim=1)


def box_loss_sums(
    box_loss: BoxLoss,
    transform: Box2BoxTransform,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """Sum a box loss over the positives of each image.

    An accelerator is not waited for, if the loss is smooth L1 or L1.

    Args:
        box_loss: elementwise, see :class:`~retina_plugin.losses.BoxLoss`.
        transform: encodes boxes as deltas and back.
        anchors_R4: of all levels, XYXY in pixels.
        deltas: per level (N, A*4, Hi, Wi), the raw head output.
        targets: labels and boxes of the batch.

    Returns:
        (N,) float32; exactly 0, with a graph, for an image without positives.
    """
    # torchvision's losses of boxes, which select by a mask, wait for an accelerator themselves, and
    # in a loss of one's own a row may depend on others
    by_mask = anchors_R4.device.type != "cpu" and box_loss.is_elementwise()
    sums_of = _of_all if by_mask else _of_positives
    return sums_of(box_loss, transform, anchors_R4, deltas, targets)


def _of_positives(
    box_loss: BoxLoss,
    transform: Box2BoxTransform,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """Some hundred rows, whose number has to be known."""
    image, anchor = targets.positive_image, targets.positive_anchor
    anchors_P4, boxes_P4 = anchors_R4[anchor], targets.positive_gt_box
    deltas_P4 = gather_anchors(deltas, image, anchor, 4)
    if box_loss.on == "boxes":
        loss_P = box_loss(transform.apply_deltas(deltas_P4, anchors_P4), boxes_P4)
    else:
        # fp32 as Detectron2's loss is under AMP; the deltas of the head may be 16 bit
        loss_P = box_loss(deltas_P4.float(), transform.get_deltas(anchors_P4, boxes_P4))
    return loss_P.new_zeros(targets.num_images).index_add(0, image, loss_P)


def _of_all(
    box_loss: BoxLoss,
    transform: Box2BoxTransform,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """Every anchor, with a loss of exactly 0 if it is not positive; some 100 bytes each."""
    positive_NR = targets.label_NR >= 0
    positive_NR1 = positive_NR[:, :, None]
    anchors_NR4 = anchors_R4.expand(len(positive_NR), -1, -1)
    deltas_NR4 = torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], dim=1)
    # the others predict no deltas and have none: masked behind the loss alone, what is not finite
    # would leave NaN in the gradient
    deltas_NR4 = torch.where(positive_NR1, deltas_NR4.float(), 0.0)
    gt_boxes_G4 = F.pad(targets.gt_boxes_G4, (0, 0, 0, 1))  # a batch may have none
    boxes_NR4 = torch.where(positive_NR1, gt_boxes_G4[targets.gt_NR], anchors_NR4)
    target_P4 = transform.get_deltas(anchors_NR4.flatten(0, 1), boxes_NR4.flatten(0, 1))
    loss_NR = box_loss(deltas_NR4.flatten(0, 1), target_P4).view_as(positive_NR)
    return torch.where(positive_NR, loss_NR, 0.0).sum(dim=1)
