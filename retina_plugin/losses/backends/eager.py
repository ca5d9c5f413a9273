"""The dense loss in plain PyTorch: any device, any dtype, any loss.

One pass over the raw head output in pieces; the few entries that are not background are fixed up by
index.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retina_plugin.losses.classification import (
    ClassificationLoss,
    FocalLoss,
    FocalLossStar,
    known_to_kernels,
)
from retina_plugin.losses.targets import IGNORED

__all__ = ["anchor_losses", "compute_dtype", "dense_sums"]

# Elements of one piece on the CPU: small enough for its few fp32 temporaries to be little beside
# the logits, large enough to hide the overhead of some thirty calls.
_PIECE = 1 << 18
# On an accelerator pieces only bound the memory.
_PIECE_ON_ACCELERATOR = 1 << 22

# sigmoid(2): of q = 1 - p_t up to it, both p_t and log(p_t) can be had within 5e-7.
_HIGHEST_Q = 0.88


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
        labels: int16 (N, A, H, W): the class of a positive anchor, ``BACKGROUND``, ``IGNORED``.
        loss: the elementwise loss and its alpha.
        num_classes: K.
        scale_N: (N,).

    Returns:
        (N, 2): background and foreground sum of each image, not scaled; float64 where the device
        has it.
    """
    if x.stride(2) != x.stride(3) * x.shape[3]:  # places do not follow each other
        copy = x.clone(memory_format=torch.contiguous_format)
        dense = None if grad is None else torch.empty_like(copy, dtype=grad.dtype)
        sums_N2 = dense_sums(copy, dense, labels, loss, num_classes, scale_N)
        if grad is not None and dense is not None:
            grad.copy_(dense)
        return sums_N2
    x = x.unflatten(1, (-1, num_classes)).flatten(3)  # (N, A, K, P), a view
    grad = None if grad is None else grad.unflatten(1, (-1, num_classes)).flatten(3)
    labels = labels.flatten(2)
    n, a, p = torch.where(labels >= 0)
    k = labels[n, a, p].long()
    x_positive = x[n, a, k, p].to(compute_dtype(x))  # now: the gradient may take its place
    ignored = torch.where(labels == IGNORED)
    background_N = _background_sums(x, grad, (n, a, p, k), ignored, loss, scale_N)
    w_positive = _positive_weight(loss, k)
    if grad is None:
        value = loss.value(x_positive)
    else:
        value, derivative = loss.value_and_derivative(x_positive)
        grad[n, a, k, p] = derivative.mul_(scale_N[n]).mul_(w_positive).to(grad.dtype)
    of_image_NP = torch.arange(len(x), device=x.device)[:, None] == n
    foreground_N = torch.where(of_image_NP, value.mul_(w_positive), 0)
    foreground_N = foreground_N.sum(dim=1, dtype=background_N.dtype)
    return torch.stack((background_N, foreground_N), dim=1)


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
        a, h, w = torch.where(labels_AHW >= 0)
        k = labels_AHW[a, h, w].long()
        value[a, k, h, w] = loss.value(image[a, k, h, w]).mul_(_positive_weight(loss, k))
        value_AHW = value.sum(dim=1).masked_fill_(labels_AHW == IGNORED, -torch.inf)
        out.append(value_AHW.permute(1, 2, 0).flatten())
    return torch.stack(out)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What losses of ``x`` are computed and returned in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _background_sums(
    x: Tensor,
    grad: Tensor | None,
    positive: Sequence[Tensor],
    ignored: Sequence[Tensor],
    loss: ClassificationLoss,
    scale_N: Tensor,
) -> Tensor:
    """(N,) loss of the entries of (N, A, K, P) that are neither; writes their gradient.

    ``positive`` is (n, a, p, k), ``ignored`` (n, a, p); their gradient becomes 0.
    """
    N, A, K, P = x.shape
    a_step, p_step, k_step = steps = _steps(x)
    positives = iter(_by_piece(positive, (N, A, P, K), (1, *steps)))
    ignoreds = _by_piece(ignored, (N, A, P), (1, a_step, p_step))
    w_neg = _negative_weight(loss, x)
    scales = scale_N.tolist()
    sums: list[list[Tensor]] = [[] for _ in scales]
    anchors = itertools.product(range(N), range(0, A, a_step), range(0, P, p_step))
    for (n, a, p), (_, a_ignored, p_ignored) in zip(anchors, ignoreds):
        for k in range(0, K, k_step):
            _, a_positive, p_positive, k_positive = next(positives)
            other: list[tuple] = []
            if len(a_ignored):
                other.append((a_ignored, slice(None), p_ignored))
            if len(a_positive):
                other.append((a_positive, k_positive, p_positive))
            piece = n, slice(a, a + a_step), slice(k, k + k_step), slice(p, p + p_step)
            sums[n] += _background(
                x[piece].to(compute_dtype(x)),
                None if grad is None else grad[piece],
                other,
                loss,
                w_neg[k : k + k_step] if isinstance(w_neg, Tensor) else w_neg,
                scales[n],
            )
    sum_dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.stack([torch.cat(some).sum(dtype=sum_dtype) for some in sums])


def _background(
    x: Tensor,
    grad: Tensor | None,
    other: Sequence[tuple],
    loss: ClassificationLoss,
    w_neg: float | Tensor,
    scale: float,
) -> list[Tensor]:
    """Sums of the loss of logits with label 0, but for the indices in ``other``, times ``w_neg``.

    Writes the gradient, times ``w_neg`` and ``scale``; 0 at ``other``.
    """
    if grad is not None and grad.dtype != x.dtype:
        wide = torch.empty_like(x)
        sums = _background(x, wide, other, loss, w_neg, scale)
        grad.copy_(wide)
        return sums
    if x.device.type == "cpu" and known_to_kernels(loss) and not isinstance(w_neg, Tensor):
        low = _low_background(x, grad, other, loss, w_neg, scale)
        if low is not None:
            return low
    if grad is None:
        value = loss.value(-x)  # background: x_t = -x
    else:
        value, derivative = loss.value_and_derivative(-x)
        torch.mul(derivative, w_neg * -scale, out=grad)  # dx_t/dx = -1
    for index in other:
        value[index] = 0
        if grad is not None:
            grad[index] = 0
    if isinstance(w_neg, Tensor):
        return _short_sums(value.mul_(w_neg))
    return _short_sums(value, w_neg)


def _low_background(
    x: Tensor,
    grad: Tensor | None,
    other: Sequence[tuple],
    loss: ClassificationLoss,
    w_neg: float,
    scale: float,
) -> list[Tensor] | None:
    """:func:`_background` in half the time if no logit is high, None if one is.

    Then log(p_t) = log1p(-q) with q = 1 - p_t, and log1p takes half as long as softplus. Near 1,
    q has lost the digits of p_t.
    """
    z, steepness = x, 1.0
    if isinstance(loss, FocalLossStar):
        z, steepness = x.mul(loss.gamma).sub_(loss.beta), loss.gamma
    q = z.sigmoid()
    for index in other:
        q[index] = 0  # and so its loss and gradient
    if not bool(q.amax() <= _HIGHEST_Q):  # also for NaN
        return None
    log_p = q.neg().log1p_()
    if not isinstance(loss, FocalLoss) or loss.gamma == 0:
        if grad is not None:
            torch.mul(q, w_neg * scale, out=grad)
        return _short_sums(log_p, -w_neg / steepness)
    if grad is not None:
        # q - gamma p_t log_p = -gamma (log_p + q (-1 / gamma - log_p))
        derivative = log_p.lerp(q.new_tensor(-1 / loss.gamma), q)
    modulating = q.pow_(loss.gamma)
    if grad is not None:
        factor = -loss.gamma * w_neg * scale
        torch.addcmul(q.new_zeros(()), derivative, modulating, value=factor, out=grad)
    return _short_sums(log_p.mul_(modulating), -w_neg)


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Anchors, positions and classes of (N, A, K, P) to take at a time, dense in memory."""
    _, A, K, P = x.shape
    size = _PIECE if x.device.type == "cpu" else _PIECE_ON_ACCELERATOR
    if x.stride(2) < x.stride(3):  # channels_last: a position holds all anchors
        return A, max(1, size // (A * K)), K
    if K * P <= size:
        return size // (K * P), P, K
    return 1, min(P, size), math.ceil(K / math.ceil(K * P / size))


def _by_piece(
    index: Sequence[Tensor], shape: Sequence[int], steps: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """Split entries of ``shape`` by the piece they lie in, where their indices start from 0.

    Pieces have the size ``steps`` and are counted like the entries.
    """
    pieces = [math.ceil(size / step) for size, step in zip(shape, steps)]
    number = torch.zeros_like(index[0])
    for i, step, count in zip(index, steps, pieces):
        number = number * count + i // step
    order = number.argsort()
    counts = number.bincount(minlength=math.prod(pieces)).tolist()
    return list(zip(*((i % step)[order].split(counts) for i, step in zip(index, steps))))


def _short_sums(value: Tensor, weight: float = 1.0) -> list[Tensor]:
    """Sums, times ``weight``, that add up to that of ``value``: of runs too short to lose digits.

    These are left to be added in float64, which takes several times as long as float32.
    """
    in_memory = sorted(range(value.dim()), key=value.stride, reverse=True)
    flat = value.permute(in_memory).flatten()  # a view
    whole = len(flat) // 256 * 256
    runs = [flat[:whole].view(-1, 256).sum(dim=1)]
    if whole < len(flat):
        runs.append(flat[whole:].sum(dim=0, keepdim=True))
    return [run.mul_(weight) for run in runs]


def _negative_weight(loss: ClassificationLoss, x: Tensor) -> float | Tensor:
    """A number, or one by class that goes with x of (..., K, and the dimensions of positions)."""
    weight = loss.negative_weight
    if not isinstance(weight, Tensor):
        return weight
    return weight.to(x.device).view(-1, *(1 for _ in x.shape[3:]))


def _positive_weight(loss: ClassificationLoss, classes: Tensor) -> float | Tensor:
    """A number, or one for each of ``classes``."""
    weight = loss.positive_weight
    return weight.to(classes.device)[classes] if isinstance(weight, Tensor) else weight
