"""The dense loss in plain PyTorch: any device, dtype, strides and loss.

The background is summed in one pass over the raw head output, in pieces. Positive and ignored
entries are set to 0 in each piece. The loss and the gradient of the few positive entries are then
computed separately, by index.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retina_plugin.losses.classification import ClassificationLoss, Formula, FormulaKind
from retina_plugin.losses.targets import IGNORED

from .interface import AlphaWeights, compute_dtype

__all__ = ["anchor_losses", "dense_sums", "supports", "unavailable"]

# Elements of a piece on the CPU: few enough that its float32 temporaries are small beside the
# logits, many enough that the overhead of some thirty calls does not count.
_PIECE = 1 << 18
# On a GPU, pieces only limit the memory.
_PIECE_ON_GPU = 1 << 22

# sigmoid(2). For q = 1 - p_t up to this, 1 - q and log1p(-q) are exact to 5e-7.
_MAX_LOW_Q = 0.88
_LOW_KINDS = (FormulaKind.FOCAL, FormulaKind.FOCAL_STAR)  # what _low_piece_sums knows


def unavailable() -> str | None:
    """None: it runs everywhere."""
    return None


def supports(x: Tensor, loss: ClassificationLoss) -> bool:
    """True: any logits, any loss."""
    return True


def dense_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    channels_last: bool,
    loss: ClassificationLoss,
    alpha: AlphaWeights,
    scale_N: Tensor,
) -> Tensor:
    """See :meth:`.interface.Backend.dense_sums`. Here the strides may be any."""
    if x.stride(2) != x.stride(3) * x.shape[3]:  # H and W cannot be viewed as one dimension
        copy = x.clone(memory_format=torch.contiguous_format)
        dense = None if grad is None else torch.empty_like(copy, dtype=grad.dtype)
        sums_N2 = dense_sums(copy, dense, labels, False, loss, alpha, scale_N)
        if grad is not None and dense is not None:
            grad.copy_(dense)
        return sums_N2
    num_classes = alpha.by_class_2K.shape[1]
    x = x.unflatten(1, (-1, num_classes)).flatten(3)  # (N, A, K, P), a view
    grad = None if grad is None else grad.unflatten(1, (-1, num_classes)).flatten(3)
    labels = labels.flatten(2)
    n, a, p = torch.where(labels >= 0)
    k = labels[n, a, p].long()
    x_positive = x[n, a, k, p].to(compute_dtype(x))  # read now: the gradient may replace it
    ignored = torch.where(labels == IGNORED)
    steps = _steps(x, channels_last)
    background_N = _background_sums(x, grad, (n, a, p, k), ignored, steps, loss, alpha, scale_N)
    positive_weight = _positive_weight(alpha, k)
    if grad is None:
        value = loss.value(x_positive)
    else:
        value, derivative = loss.value_and_derivative(x_positive)
        grad[n, a, k, p] = derivative.mul_(scale_N[n]).mul_(positive_weight).to(grad.dtype)
    is_of_image_NP = torch.arange(len(x), device=x.device)[:, None] == n
    foreground_N = torch.where(is_of_image_NP, value.mul_(positive_weight), 0)
    foreground_N = foreground_N.sum(dim=1, dtype=background_N.dtype)
    return torch.stack((background_N, foreground_N), dim=1)


def anchor_losses(
    x: Tensor, labels: Tensor, loss: ClassificationLoss, alpha: AlphaWeights
) -> Tensor:
    """The loss of each anchor of one level; arguments as for :func:`dense_sums`.

    Returns:
        (N, H*W*A) float32 (float64 for float64 logits), -inf where ignored.
    """
    num_classes = alpha.by_class_2K.shape[1]
    x = x.unflatten(1, (-1, num_classes))  # (N, A, K, H, W)
    negative_weight = _negative_weight(alpha, x)
    out = []
    for image, labels_AHW in zip(x, labels):  # one image at a time, to limit the memory
        image = image.to(compute_dtype(x))
        value = loss.value(-image).mul_(negative_weight)
        a, h, w = torch.where(labels_AHW >= 0)
        k = labels_AHW[a, h, w].long()
        value[a, k, h, w] = loss.value(image[a, k, h, w]).mul_(_positive_weight(alpha, k))
        value_AHW = value.sum(dim=1).masked_fill_(labels_AHW == IGNORED, -torch.inf)
        out.append(value_AHW.permute(1, 2, 0).flatten())
    return torch.stack(out)


def _background_sums(
    x: Tensor,
    grad: Tensor | None,
    positive: Sequence[Tensor],
    ignored: Sequence[Tensor],
    steps: tuple[int, int, int],
    loss: ClassificationLoss,
    alpha: AlphaWeights,
    scale_N: Tensor,
) -> Tensor:
    """(N,) loss of the background entries of (N, A, K, P), and their gradient.

    ``positive`` are indices (n, a, p, k) and ``ignored`` indices (n, a, p). The gradient there is
    set to 0.
    """
    N, A, K, P = x.shape
    a_step, p_step, k_step = steps
    positives = iter(_by_piece(positive, (N, A, P, K), (1, *steps)))
    ignoreds = _by_piece(ignored, (N, A, P), (1, a_step, p_step))
    weight = _negative_weight(alpha, x)
    scales = scale_N.tolist()
    sums: list[list[Tensor]] = [[] for _ in scales]
    anchors = itertools.product(range(N), range(0, A, a_step), range(0, P, p_step))
    for (n, a, p), (_, a_ignored, p_ignored) in zip(anchors, ignoreds):
        for k in range(0, K, k_step):
            _, a_positive, p_positive, k_positive = next(positives)
            excluded: list[tuple] = []
            if len(a_ignored):
                excluded.append((a_ignored, slice(None), p_ignored))
            if len(a_positive):
                excluded.append((a_positive, k_positive, p_positive))
            piece = n, slice(a, a + a_step), slice(k, k + k_step), slice(p, p + p_step)
            sums[n] += _piece_sums(
                x[piece].to(compute_dtype(x)),
                None if grad is None else grad[piece],
                excluded,
                loss,
                weight[k : k + k_step] if isinstance(weight, Tensor) else weight,
                scales[n],
            )
    sum_dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.stack([torch.cat(of_image).sum(dtype=sum_dtype) for of_image in sums])


def _piece_sums(
    x: Tensor,
    grad: Tensor | None,
    excluded: Sequence[tuple],
    loss: ClassificationLoss,
    weight: float | Tensor,
    scale: float,
) -> list[Tensor]:
    """Sums of the weighted loss of logits with label 0, without the indices in ``excluded``.

    Writes the gradient, times ``weight`` and ``scale``; it is 0 at ``excluded``.
    """
    if grad is not None and grad.dtype != x.dtype:
        wide = torch.empty_like(x)
        sums = _piece_sums(x, wide, excluded, loss, weight, scale)
        grad.copy_(wide)
        return sums
    formula = loss.kernel_formula()
    if (
        formula is not None
        and formula.kind in _LOW_KINDS
        and x.device.type == "cpu"
        and not isinstance(weight, Tensor)
    ):
        low = _low_piece_sums(x, grad, excluded, formula, weight, scale)
        if low is not None:
            return low
    if grad is None:
        value = loss.value(-x)  # label 0: x_t = -x
    else:
        value, derivative = loss.value_and_derivative(-x)
        torch.mul(derivative, weight * -scale, out=grad)  # dx_t/dx = -1
    for index in excluded:
        value[index] = 0
        if grad is not None:
            grad[index] = 0
    if isinstance(weight, Tensor):
        return _short_sums(value.mul_(weight))
    return _short_sums(value, weight)


def _low_piece_sums(
    x: Tensor,
    grad: Tensor | None,
    excluded: Sequence[tuple],
    formula: Formula,
    weight: float,
    scale: float,
) -> list[Tensor] | None:
    """:func:`_piece_sums` in half the time; None if a logit is NaN or its sigmoid near 1.

    With q = 1 - p_t, log(p_t) = log1p(-q), and log1p takes half the time of softplus. It is not
    used for q near 1, where 1 - q has lost the digits of p_t.
    """
    z, steepness = x, 1.0
    if formula.kind == FormulaKind.FOCAL_STAR:
        z, steepness = x.mul(formula.gamma).sub_(formula.beta), formula.gamma
    q = z.sigmoid()
    for index in excluded:
        q[index] = 0  # makes loss and gradient 0
    if not bool(q.amax() <= _MAX_LOW_Q):  # also for NaN
        return None
    log_p = q.neg().log1p_()
    if formula.kind == FormulaKind.FOCAL_STAR or formula.gamma == 0:
        if grad is not None:
            torch.mul(q, weight * scale, out=grad)
        return _short_sums(log_p, -weight / steepness)
    if grad is not None:
        # q - gamma p_t log_p = -gamma (log_p + q (-1 / gamma - log_p))
        derivative = log_p.lerp(q.new_tensor(-1 / formula.gamma), q)
    modulating = q.pow_(formula.gamma)
    if grad is not None:
        factor = -formula.gamma * weight * scale
        torch.addcmul(q.new_zeros(()), derivative, modulating, value=factor, out=grad)
    return _short_sums(log_p.mul_(modulating), -weight)


def _steps(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """How many anchors, positions and classes a piece has.

    A piece is a slice of logits (N, A, K, H*W) that is contiguous in memory.
    """
    _, A, K, P = x.shape
    size = _PIECE if x.device.type == "cpu" else _PIECE_ON_GPU
    if channels_last:  # a position holds all anchors
        return A, max(1, size // (A * K)), K
    if K * P <= size:
        return size // (K * P), P, K
    return 1, min(P, size), math.ceil(K / math.ceil(K * P / size))


def _by_piece(
    index: Sequence[Tensor], shape: Sequence[int], steps: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    """The indices of each piece, counted from the piece's first entry.

    ``index`` are indices into ``shape``, which is cut into pieces of the size ``steps``; pieces are
    in row-major order.
    """
    pieces = [math.ceil(size / step) for size, step in zip(shape, steps)]
    piece = torch.zeros_like(index[0])
    for i, step, count in zip(index, steps, pieces):
        piece = piece * count + i // step
    order = piece.argsort()
    counts = piece.bincount(minlength=math.prod(pieces)).tolist()
    return list(zip(*((i % step)[order].split(counts) for i, step in zip(index, steps))))


def _short_sums(value: Tensor, weight: float = 1.0) -> list[Tensor]:
    """Sums of runs of 256 entries, times ``weight``, and of the rest.

    A run is short enough to be summed in float32; the caller adds the runs in float64. Summing all
    in float64 would take several times as long.
    """
    in_memory = sorted(range(value.dim()), key=value.stride, reverse=True)
    flat = value.permute(in_memory).flatten()  # a view
    whole = len(flat) // 256 * 256
    runs = [flat[:whole].view(-1, 256).sum(dim=1)]
    if whole < len(flat):
        runs.append(flat[whole:].sum(dim=0, keepdim=True))
    return [run.mul_(weight) for run in runs]


def _negative_weight(alpha: AlphaWeights, x: Tensor) -> float | Tensor:
    """A number, or one for each class that broadcasts with (..., K, and x's last dimensions)."""
    if alpha.shared is not None:
        return alpha.shared[0]
    return alpha.by_class_2K[0].view(-1, *(1 for _ in x.shape[3:]))


def _positive_weight(alpha: AlphaWeights, classes: Tensor) -> float | Tensor:
    """A number, or one for each of ``classes``."""
    return alpha.by_class_2K[1][classes] if alpha.shared is None else alpha.shared[1]
