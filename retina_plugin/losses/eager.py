"""The dense loss in plain PyTorch: any device, any dtype, any loss.

One pass over the raw head output in pieces small enough to stay in the cache; the few entries that
are not background are fixed up by index.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .classification import ClassificationLoss

__all__ = ["IGNORED", "anchor_losses", "compute_dtype", "dense_sums"]

IGNORED = -2  # in a map of labels; -1 is background, others are classes

# Elements of one piece on the CPU: small enough for its few fp32 temporaries to stay in the cache
# and to be little beside the logits, large enough to hide the overhead of some twenty calls (the
# two largest of 2^15 .. 2^18 were the fastest).
_PIECE = 1 << 17
# On an accelerator pieces only bound the memory.
_PIECE_ON_ACCELERATOR = 1 << 22


def dense_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    loss: ClassificationLoss,
    num_classes: int,
    scale_N: Tensor,
) -> Tensor:
    """Sum a loss over one level and write its gradient.

    Args:
        x: (N, A*K, H, W) logits of any dtype and strides.
        grad: where the gradient goes, times ``scale_N``; of the shape of ``x``, or ``x`` itself,
            or None.
        labels: int16 (N, A, H, W): the class of a positive anchor, -1 for background, ``IGNORED``.
        loss: the elementwise loss and its alpha.
        num_classes: K.
        scale_N: (N,).

    Returns:
        (N, 2): background and foreground sum of each image, not scaled; float64 where the device
        has it.
    """
    x = x.unflatten(1, (-1, num_classes))  # (N, A, K, H, W), a view
    grad = None if grad is None else grad.unflatten(1, (-1, num_classes))
    sum_dtype = torch.float32 if x.device.type == "mps" else torch.float64
    sums_N2 = torch.zeros(len(x), 2, dtype=sum_dtype, device=x.device)
    w_neg = _negative_weight(loss, x)
    by_class = isinstance(w_neg, Tensor)
    scales = scale_N.tolist()
    labelled_NAH = (labels != -1).any(dim=3).cpu().numpy()
    for n, a, h in _pieces(x):
        x_piece = x[n, a, :, h].to(compute_dtype(x))  # (A', K, H', W)
        any_labelled = labelled_NAH[n, a, h].any()
        if any_labelled:
            positive, ignored = _labelled(labels[n, a, h])
            x_pos = x_piece[positive]  # now: the gradient may take the place of x
        if grad is None:
            value = loss.value(-x_piece)  # background: x_t = -x
        else:
            value, derivative = loss.value_and_derivative(-x_piece)
            grad_piece = grad[n, a, :, h]
            if by_class:
                derivative.mul_(w_neg)
            factor = -scales[n] if by_class else -w_neg * scales[n]  # dx_t/dx = -1
            if grad_piece.dtype == derivative.dtype:
                torch.mul(derivative, factor, out=grad_piece)
            else:
                grad_piece.copy_(derivative.mul_(factor))
        if any_labelled:
            value[ignored] = 0
            value[positive] = 0
            w_pos = _positive_weight(loss, positive[1])
            if grad is None:
                value_pos = loss.value(x_pos)
            else:
                value_pos, derivative_pos = loss.value_and_derivative(x_pos)
                grad_piece[ignored] = 0
                factor = scales[n] * w_pos
                grad_piece[positive] = derivative_pos.mul_(factor).to(grad.dtype)
            sums_N2[n, 1] += value_pos.mul_(w_pos).sum(dtype=sum_dtype)
        if by_class:
            value.mul_(w_neg)
        background = _sum(value, sum_dtype)
        sums_N2[n, 0] += background if by_class else background * w_neg
    return sums_N2


def anchor_losses(x: Tensor, labels: Tensor, loss: ClassificationLoss, num_classes: int) -> Tensor:
    """The loss of each anchor of one level; arguments as for :func:`dense_sums`.

    Returns:
        (N, H*W*A) float32 (float64 for float64 logits), -inf where ignored.
    """
    x = x.unflatten(1, (-1, num_classes))  # (N, A, K, H, W)
    w_neg = _negative_weight(loss, x)
    out = []
    for image, labels_AHW in zip(x, labels):  # one at a time bounds the memory
        image = image.to(compute_dtype(x))
        value = loss.value(-image).mul_(w_neg)
        positive, _ = _labelled(labels_AHW)
        w_pos = _positive_weight(loss, positive[1])
        value[positive] = loss.value(image[positive]).mul_(w_pos)
        value_AHW = value.sum(dim=1).masked_fill_(labels_AHW == IGNORED, -torch.inf)
        out.append(value_AHW.permute(1, 2, 0).flatten())
    return torch.stack(out)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What losses of ``x`` are computed and returned in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum in ``dtype``. Short runs first, in their own: several times faster than to convert each
    entry, and no run is long enough to lose digits."""
    flat = value.flatten()
    runs = flat[: len(flat) // 256 * 256].view(-1, 256).sum(dim=1)
    return runs.sum(dtype=dtype) + flat[len(flat) // 256 * 256 :].sum(dtype=dtype)


def _labelled(labels_AHW: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | slice, ...]]:
    """Indices into (A, K, H, W): the positive entries, and all entries of ignored anchors."""
    a, h, w = torch.where(labels_AHW >= 0)
    positive = (a, labels_AHW[a, h, w].long(), h, w)
    a, h, w = torch.where(labels_AHW == IGNORED)
    return positive, (a, slice(None), h, w)


def _negative_weight(loss: ClassificationLoss, x: Tensor) -> float | Tensor:
    """A number, or (K, 1, 1) to go with (..., K, H, W)."""
    weight = loss.negative_weight
    return weight.to(x.device).view(-1, 1, 1) if isinstance(weight, Tensor) else weight


def _positive_weight(loss: ClassificationLoss, classes: Tensor) -> float | Tensor:
    """A number, or one for each of ``classes``."""
    weight = loss.positive_weight
    return weight.to(classes.device)[classes] if isinstance(weight, Tensor) else weight


def _pieces(x: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(image, anchors, rows) of (N, A, K, H, W) logits, each piece dense in memory or nearly so."""
    N, A, K, H, W = x.shape
    size = _PIECE if x.device.type == "cpu" else _PIECE_ON_ACCELERATOR
    if x.stride(2) < x.stride(4):  # channels_last: a row holds all anchors
        a_step, h_step = A, max(1, size // (A * K * W))
    else:
        a_step = max(1, size // (K * H * W))
        h_step = H if a_step > 1 else max(1, size // (K * W))
    for n in range(N):
        for a in range(0, A, a_step):
            for h in range(0, H, h_step):
                yield n, slice(a, min(a + a_step, A)), slice(h, min(h + h_step, H))
