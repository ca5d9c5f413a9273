"""From predicted deltas to the sums of the box loss (section 4, "Box Regression Subnet")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from retina_plugin.losses import BoxLoss, DenseTargets

from .contracts import BoxCoder
from .shapes import gather_anchors

__all__ = ["BoxTransform", "box_loss_sums", "encode"]


class BoxTransform(Box2BoxTransform):
    """Detectron2's ``Box2BoxTransform`` without GPU synchronisation.

    Detectron2 checks that the anchors have a positive width, which synchronises. On the CPU its own
    method is called; on a GPU :func:`encode` computes the same deltas without the check.
    """

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """(P, 4) deltas from anchors to boxes, both (P, 4) XYXY: Detectron2's to the bit."""
        if src_boxes.device.type == "cpu":
            return super().get_deltas(src_boxes, target_boxes)
        return encode(src_boxes, target_boxes, self.weights)


def encode(anchors_P4: Tensor, boxes_P4: Tensor, weights: Sequence[float]) -> Tensor:
    """(P, 4) deltas. Operations and order are those of ``Box2BoxTransform.get_deltas``.

    For an anchor with centre (ax, ay) and size (aw, ah) and a box (x, y, w, h) they are ::

        dx = wx (x - ax) / aw    dw = ww log(w / aw)
        dy = wy (y - ay) / ah    dh = wh log(h / ah)
    """
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
    box_coder: BoxCoder,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """Sum a box loss over the positive anchors of each image.

    On a GPU, elementwise losses (smooth L1, L1) do not synchronise. The IoU losses do.

    Args:
        box_loss: the loss of each anchor, see :class:`~retina_plugin.losses.BoxLoss`.
        box_coder: encodes boxes as deltas and decodes them.
        anchors_R4: anchors of all levels, XYXY in pixels.
        deltas: per level (N, A*4, Hi, Wi), the raw head output.
        targets: labels and boxes of the batch.

    Returns:
        (N,) float32. An image without positive anchors has 0, which still has a gradient (of 0).
    """
    # Dense on a GPU, because gathering needs the number of positives on the host and so
    # synchronises. But only if each loss depends on its own anchor alone. (torchvision's IoU losses
    # synchronise anyway.)
    dense = anchors_R4.device.type != "cpu" and box_loss.is_elementwise()
    sum_loss = _dense_box_loss if dense else _gathered_box_loss
    return sum_loss(box_loss, box_coder, anchors_R4, deltas, targets)


def _gathered_box_loss(
    box_loss: BoxLoss,
    box_coder: BoxCoder,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """The loss of the positive anchors only: a few hundred rows."""
    image, anchor = targets.positive_image, targets.positive_anchor
    anchors_P4, boxes_P4 = anchors_R4[anchor], targets.positive_gt_box
    deltas_P4 = gather_anchors(deltas, image, anchor, 4)
    if box_loss.on == "boxes":
        loss_P = box_loss(box_coder.apply_deltas(deltas_P4, anchors_P4), boxes_P4)
    else:
        # float32, as Detectron2's loss is under AMP; the head's deltas may have 16 bits
        loss_P = box_loss(deltas_P4.float(), box_coder.get_deltas(anchors_P4, boxes_P4))
    return loss_P.new_zeros(targets.num_images).index_add(0, image, loss_P)


def _dense_box_loss(
    box_loss: BoxLoss,
    box_coder: BoxCoder,
    anchors_R4: Tensor,
    deltas: Sequence[Tensor],
    targets: DenseTargets,
) -> Tensor:
    """The loss of every anchor, then 0 where it is not positive: about 100 bytes an anchor."""
    positive_NR = targets.label_NR >= 0
    positive_NR1 = positive_NR[:, :, None]
    anchors_NR4 = anchors_R4.expand(len(positive_NR), -1, -1)
    deltas_NR4 = torch.cat([permute_to_N_HWA_K(x, 4) for x in deltas], dim=1)
    # Zero non-positive anchors before the loss, not only after it: inf or NaN there would reach the
    # gradient.
    deltas_NR4 = torch.where(positive_NR1, deltas_NR4.float(), 0.0)
    gt_boxes_G4 = F.pad(targets.gt_boxes_G4, (0, 0, 0, 1))  # one more box: a batch may have none
    boxes_NR4 = torch.where(positive_NR1, gt_boxes_G4[targets.gt_NR], anchors_NR4)
    target_P4 = box_coder.get_deltas(anchors_NR4.flatten(0, 1), boxes_NR4.flatten(0, 1))
    loss_NR = box_loss(deltas_NR4.flatten(0, 1), target_P4).view_as(positive_NR)
    return torch.where(positive_NR, loss_NR, 0.0).sum(dim=1)
