"""The sum of a classification loss over the anchors that a sampler chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends.interface import compute_dtype
from .classification import ClassificationLoss
from .dense import DenseLoss
from .targets import DenseTargets

__all__ = ["sampled_classification_loss"]


def sampled_classification_loss(
    logits_SK: Tensor,
    sample_image: Tensor,
    sample_anchor: Tensor,
    targets: DenseTargets,
    loss: ClassificationLoss,
) -> DenseLoss:
    """Sum ``loss`` over some anchors of each image (OHEM, section 5.1).

    Args:
        logits_SK: (S, K) logits of the chosen anchors.
        sample_image, sample_anchor: (S,) int64: image in [0, N) and anchor in [0, R) of each row.
            None of them may be ignored.
        targets: labels of the batch.
        loss: the elementwise loss and its alpha.

    Returns:
        As :func:`~retina_plugin.losses.dense_classification_loss`, but summed over the chosen
        anchors only.
    """
    image, anchor = targets.positive_image, targets.positive_anchor
    x_SK = logits_SK.to(compute_dtype(logits_SK))
    # S and P are small: S x P comparisons are cheaper than a table of all anchors
    same = (sample_image[:, None] == image) & (sample_anchor[:, None] == anchor)
    row, positive = torch.where(same)
    y_SK = torch.full_like(x_SK, -1.0)
    y_SK[row, targets.positive_class[positive]] = 1.0
    weight_SK = torch.where(
        y_SK > 0,
        torch.as_tensor(loss.positive_weight, dtype=x_SK.dtype, device=x_SK.device),
        torch.as_tensor(loss.negative_weight, dtype=x_SK.dtype, device=x_SK.device),
    )
    value_SK = weight_SK * _ElementwiseLoss.apply(x_SK * y_SK, loss)

    def by_image(value: Tensor) -> Tensor:
        return value.new_zeros(targets.num_images).index_add(0, sample_image, value.sum(dim=1))

    foreground_N = by_image(value_SK.detach() * (y_SK > 0))
    total_N = by_image(value_SK)
    return DenseLoss(total_N, foreground_N, total_N.detach() - foreground_N)


class _ElementwiseLoss(torch.autograd.Function):
    """``loss.value`` with ``loss.derivative`` as its gradient."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, loss: ClassificationLoss) -> Tensor:
        value, derivative = loss.value_and_derivative(x_t)
        ctx.save_for_backward(derivative)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None
