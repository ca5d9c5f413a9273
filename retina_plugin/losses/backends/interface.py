"""The contract of a backend: a module with the functions of :class:`Backend`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from retina_plugin.losses.classification import ClassificationLoss

__all__ = ["AlphaWeights", "Backend", "compute_dtype"]


class Backend(Protocol):
    """Sums a classification loss over one level and writes its gradient.

    N images, A anchors of a location, K classes; entry (n, a * K + k, h, w) of the logits is class
    k of anchor a.
    """

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine, or None if it can. May compile it."""

    def supports(self, x: Tensor, loss: ClassificationLoss) -> bool:
        """Whether :meth:`dense_sums` takes these logits (device, dtype, strides) and this loss."""

    def dense_sums(
        self,
        x: Tensor,
        grad: Tensor | None,
        labels: Tensor,
        channels_last: bool,
        loss: ClassificationLoss,
        alpha: AlphaWeights,
        scale_N: Tensor,
    ) -> Tensor:
        """Sum a loss over one level and write its gradient.

        Args:
            x: (N, A*K, H, W) logits that :meth:`supports` accepts.
            grad: where the gradient is written, times ``scale_N``; None for no gradient. Strides
                and dtype of ``x`` (float32 for float16), or ``x`` itself: the gradient then
                replaces the logits.
            labels: (N, A, H, W) int16: the class of a positive anchor, ``BACKGROUND`` or
                ``IGNORED``; in memory like ``x``.
            channels_last: the memory order of ``x`` and ``labels``: NHWC, otherwise NCHW.
            loss: the elementwise loss. Its alpha is not read.
            alpha: the weights of both labels.
            scale_N: (N,) float32, or float64 for float64 logits.

        Returns:
            (N, 2): background sum and foreground sum of each image, weighted by alpha and not by
            ``scale_N``. float64 where the device has it. Ignored anchors add 0 to sums and
            gradient, even if their logits are not finite.
        """


class AlphaWeights(NamedTuple):
    """alpha_t (Eq. 3, 5) of the entries with label 0 (row 0) and with label 1 (row 1)."""

    by_class_2K: Tensor  # float32, on the device of the logits
    shared: tuple[float, float] | None  # the same in double precision if all classes share them

    @classmethod
    def of(cls, loss: ClassificationLoss, num_classes: int, device: torch.device) -> AlphaWeights:
        weights = loss.negative_weight, loss.positive_weight
        by_class_2K = torch.empty(2, num_classes, dtype=torch.float32, device=device)
        for row, weight in zip(by_class_2K, weights):
            if isinstance(weight, Tensor):
                # a copy from pinned memory does not synchronise with the GPU
                weight = weight.pin_memory() if device.type == "cuda" else weight
                row.copy_(weight, non_blocking=True)
            else:
                row.fill_(weight)
        negative, positive = weights
        if isinstance(negative, Tensor) or isinstance(positive, Tensor):
            return cls(by_class_2K, None)
        return cls(by_class_2K, (negative, positive))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which losses of ``x`` are computed and returned: float32, or float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
