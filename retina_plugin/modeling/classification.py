"""From logits to the sums of the classification loss (section 4.1, "Focal Loss")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retina_plugin.losses import (
    ClassificationLoss,
    DenseLoss,
    DenseTargets,
    anchor_losses,
    dense_classification_loss,
    sampled_classification_loss,
)

from .contracts import BoxCoder, Sampler
from .shapes import gather_anchors

__all__ = ["cls_loss_sums"]


def cls_loss_sums(
    cls_loss: ClassificationLoss,
    sampler: Sampler,
    box_coder: BoxCoder,
    anchors_R4: Tensor,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    targets: DenseTargets,
    divisor_N: Tensor,
    *,
    num_classes: int,
    backend: str = "auto",
    in_place: bool = False,
) -> tuple[DenseLoss, Tensor]:
    """Sum the classification loss over the sampler's anchors of each image.

    Args:
        cls_loss: the elementwise loss.
        sampler: chooses the anchors.
        box_coder: decodes the boxes that a sampler may ask for.
        anchors_R4: anchors of all levels, XYXY in pixels.
        logits, deltas: per level (N, A*K, Hi, Wi) and (N, A*4, Hi, Wi), the raw head output.
        targets: labels of the batch.
        divisor_N: the normaliser's divisors.
        num_classes: K.
        backend, in_place: see ``dense_classification_loss``.

    Returns:
        The sums of each image and the divisors (N,): ``divisor_N`` if the sampler takes all
        anchors. A sampled image's loss is the mean over its anchors (section 5.1), and that of the
        batch the mean over its images.
    """

    def score_anchors() -> Tensor:
        return anchor_losses(logits, targets, cls_loss, num_classes)

    def predict_boxes(n: int, anchor_S: Tensor) -> Tensor:
        deltas_S4 = gather_anchors(deltas, torch.full_like(anchor_S, n), anchor_S, 4)
        return box_coder.apply_deltas(deltas_S4, anchors_R4[anchor_S])

    sample = sampler(targets, score_anchors, predict_boxes)
    if sample is None:
        sums = dense_classification_loss(
            logits,
            targets,
            cls_loss,
            num_classes,
            backend=backend,
            expected_grad_N=1 / divisor_N,
            in_place=in_place,
        )
        return sums, divisor_N
    logits_SK = gather_anchors(logits, sample.image, sample.anchor, num_classes)
    sums = sampled_classification_loss(logits_SK, sample.image, sample.anchor, targets, cls_loss)
    sampled_N = torch.bincount(sample.image, minlength=targets.num_images)
    return sums, sampled_N.clamp(min=1).float() * targets.num_images
