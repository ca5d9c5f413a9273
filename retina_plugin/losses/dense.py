"""The one place that sums a classification loss over every anchor of a batch.

Almost every anchor is background, so with l the elementwise loss and w the alpha weights

    sum of loss = sum over all (anchor, class) that are neither positive nor ignored of w_neg l(-x)
                + sum over positives of w_pos l(x)

is one pass over the raw head output, in pieces small enough to stay in the cache, where the few
entries that differ are fixed up by index. No one-hot target, no mask of all anchors, no permute
and no concatenation of levels is made. The derivative is known in closed form (Appendix B), so
the forward pass writes the gradient and keeps nothing else: extra memory is 1x the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .classification import ClassificationLoss

__all__ = [
    "DenseLoss",
    "DenseTargets",
    "anchor_losses",
    "dense_classification_loss",
]

# Elements of one piece on the CPU: small enough for its few fp32 temporaries to stay in a core's
# cache, large enough to hide the calls' overhead (2^17 and 2^18 were the fastest of 2^14 .. 2^20).
_PIECE = 1 << 17
# On an accelerator pieces only bound the memory.
_PIECE_ON_ACCELERATOR = 1 << 22


@dataclass
class DenseTargets:
    """What the anchors of a batch shall predict; everything not named here is background.

    P positives and M ignored anchors; ``anchor`` counts over all levels in Detectron2's order
    (level, row, column, anchor of the location), so it lies in [0, R).
    """

    num_images: int
    positive_image: Tensor  # (P,) int64 in [0, N)
    positive_anchor: Tensor  # (P,) int64 in [0, R)
    positive_class: Tensor  # (P,) int64 in [0, K)
    positive_gt_box: Tensor  # (P, 4) the assigned boxes, XYXY in pixels of the network's input
    ignored_image: Tensor  # (M,) int64
    ignored_anchor: Tensor  # (M,) int64

    def num_positives_N(self) -> Tensor:
        """(N,) int64: the anchors of each image that are assigned to a ground-truth box."""
        return torch.bincount(self.positive_image, minlength=self.num_images)


class DenseLoss(NamedTuple):
    """Sums over each image's anchors, not yet divided by anything. Each (N,)."""

    total: Tensor  # differentiable
    foreground: Tensor  # detached part of the entries with label 1
    background: Tensor  # detached part of the entries with label 0


def dense_classification_loss(
    logits: Sequence[Tensor],
    targets: DenseTargets,
    loss: ClassificationLoss,
    num_classes: int,
) -> DenseLoss:
    """Sum ``loss`` over all anchors and classes of each image.

    Args:
        logits: per level (N, A*K, Hi, Wi), the raw head output; channel ``a * K + k`` is class k
            of anchor a. Any memory layout; float64, float32, bfloat16 or float16. The arithmetic
            is float32 (float64 for float64), the sums are float64 where the device has it. The
            gradient of float16 logits is kept in float32 until it is scaled.
        targets: labels of the batch.
        loss: the elementwise loss and its alpha.
        num_classes: K.

    Returns:
        Sums by image, float32 (float64 for float64 logits). Ignored anchors add exactly nothing.
        ``total`` can be differentiated once, and its graph used once: the gradient that the
        forward pass wrote is scaled in place and given away.

    Raises:
        ValueError: logits that do not fit ``num_classes`` or ``targets``.
    """
    for x in logits:
        if x.dim() != 4 or x.shape[0] != targets.num_images or x.shape[1] % num_classes:
            raise ValueError(
                f"logits of shape {tuple(x.shape)} are not (N, A*K, H, W) with "
                f"N={targets.num_images} and K={num_classes}"
            )
    # inside a Function's forward the grad mode is off, whatever it was outside
    want_grad = torch.is_grad_enabled()
    return DenseLoss(*_DenseLossFunction.apply(targets, loss, num_classes, want_grad, *logits))


def anchor_losses(
    logits: Sequence[Tensor],
    targets: DenseTargets,
    loss: ClassificationLoss,
    num_classes: int,
) -> Tensor:
    """The loss of each anchor by itself, to choose anchors by; no gradient.

    Args: as :func:`dense_classification_loss`.

    Returns:
        (N, R) float32 (float64 for float64 logits), summed over classes; -inf where ignored.
    """
    with torch.no_grad(), torch.autocast(logits[0].device.type, enabled=False):
        levels = _LevelTargets.of_levels(targets, logits, num_classes)
        losses = [_level_anchor_losses(x, level, loss) for x, level in zip(logits, levels)]
        return torch.cat([losses_NHWA.flatten(1) for losses_NHWA in losses], dim=1)


class _DenseLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets: DenseTargets,
        loss: ClassificationLoss,
        num_classes: int,
        want_grad: bool,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x0 = logits[0]
        # float16 would lose what a loss scaler, whose factor only comes in backward, keeps alive
        grads = [
            torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
            if want_grad and x.requires_grad
            else None
            for x in logits
        ]
        sum_dtype = torch.float32 if x0.device.type == "mps" else torch.float64
        foreground_N = x0.new_zeros(targets.num_images, dtype=sum_dtype)
        background_N = torch.zeros_like(foreground_N)
        with torch.autocast(x0.device.type, enabled=False):
            levels = _LevelTargets.of_levels(targets, logits, num_classes)
            for x, grad, level in zip(logits, grads, levels):
                _sum_level(x, grad, level, loss, foreground_N, background_N)
        ctx.grads, ctx.dtypes = grads, [x.dtype for x in logits]
        out_dtype = compute_dtype(x0)
        total_N = (foreground_N + background_N).to(out_dtype)
        foreground_N, background_N = foreground_N.to(out_dtype), background_N.to(out_dtype)
        ctx.mark_non_differentiable(foreground_N, background_N)
        return total_N, foreground_N, background_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the dense loss gives its gradient away at the first backward pass: "
                "compute the loss again instead of calling backward() twice on it"
            )
        grads, ctx.grads = ctx.grads, None
        scale = grad_N.view(-1, 1, 1, 1)
        scaled = (
            None if g is None else g.mul_(scale.to(g.dtype)).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes)
        )
        return None, None, None, None, *scaled


@dataclass
class _LevelTargets:
    """Targets of one level, as coordinates of the logits viewed as (N, A, K, H, W)."""

    num_classes: int
    positive: Tensor  # (5, P): image, anchor of the location, class, row, column
    ignored: Tensor  # (4, M): image, anchor of the location, row, column

    @classmethod
    def of_levels(
        cls, targets: DenseTargets, logits: Sequence[Tensor], num_classes: int
    ) -> Iterator[_LevelTargets]:
        start = 0  # first anchor of the level
        for x in logits:
            end = start + x[0].numel() // num_classes
            yield cls.select(targets, start, end, x, num_classes)
            start = end

    @classmethod
    def select(
        cls, targets: DenseTargets, start: int, end: int, x: Tensor, num_classes: int
    ) -> _LevelTargets:
        A, W = x.shape[1] // num_classes, x.shape[3]

        def locate(image: Tensor, anchor: Tensor, *more: Tensor) -> Tensor:
            here = (anchor >= start) & (anchor < end)
            index = anchor[here] - start
            place = index.div(A, rounding_mode="floor")
            row, column = place.div(W, rounding_mode="floor"), place % W
            return torch.stack([image[here], index % A, *(m[here] for m in more), row, column])

        return cls(
            num_classes,
            locate(targets.positive_image, targets.positive_anchor, targets.positive_class),
            locate(targets.ignored_image, targets.ignored_anchor),
        )


def _sum_level(
    x: Tensor,
    grad: Tensor | None,
    level: _LevelTargets,
    loss: ClassificationLoss,
    foreground_N: Tensor,
    background_N: Tensor,
) -> None:
    """Add one level's sums to ``foreground_N`` and ``background_N`` and write its gradient."""
    x = x.detach().unflatten(1, (-1, level.num_classes))  # (N, A, K, H, W), a view
    if grad is not None:
        grad = grad.unflatten(1, (-1, level.num_classes))
    w_neg = _negative_weight(loss, x)
    for n, a, h in _pieces(x):
        piece = x[n, a, :, h]  # (A', K, H', W)
        x_piece = piece.to(compute_dtype(x))
        pos = _inside(level.positive, n, a, h)
        ignored_a, ignored_h, ignored_w = _inside(level.ignored, n, a, h)
        at_pos = (pos[0], pos[1], pos[2], pos[3])  # anchor, class, row, column
        x_pos = x_piece[at_pos]
        w_pos = _positive_weight(loss, pos[1])
        if grad is None:
            value, value_pos = loss.value(-x_piece), loss.value(x_pos)
        else:
            value, derivative = loss.value_and_derivative(-x_piece)  # background: x_t = -x
            value_pos, derivative_pos = loss.value_and_derivative(x_pos)
            derivative = derivative.mul_(-w_neg)  # dx_t/dx = -1
            derivative[ignored_a, :, ignored_h, ignored_w] = 0
            derivative[at_pos] = derivative_pos.mul_(w_pos)
            grad[n, a, :, h] = derivative
        value[ignored_a, :, ignored_h, ignored_w] = 0
        value[at_pos] = 0
        background_N[n] += value.mul_(w_neg).sum(dtype=background_N.dtype)
        foreground_N[n] += value_pos.mul_(w_pos).sum(dtype=foreground_N.dtype)


def _level_anchor_losses(x: Tensor, level: _LevelTargets, loss: ClassificationLoss) -> Tensor:
    """(N, H, W, A) losses of one level, an image at a time."""
    x = x.unflatten(1, (-1, level.num_classes))  # (N, A, K, H, W)
    w_neg = _negative_weight(loss, x)
    out = []
    for n, image in enumerate(x):
        image = image.to(compute_dtype(x))
        value = loss.value(-image).mul_(w_neg)
        _, a, k, h, w = level.positive[:, level.positive[0] == n]
        value[a, k, h, w] = loss.value(image[a, k, h, w]).mul_(_positive_weight(loss, k))
        value_AHW = value.sum(dim=1)
        _, a, h, w = level.ignored[:, level.ignored[0] == n]
        value_AHW[a, h, w] = -torch.inf
        out.append(value_AHW.permute(1, 2, 0))
    return torch.stack(out)


def _negative_weight(loss: ClassificationLoss, x: Tensor) -> float | Tensor:
    """A number, or (K, 1, 1) to go with (..., K, H, W)."""
    weight = loss.negative_weight
    return weight.to(x.device).view(-1, 1, 1) if isinstance(weight, Tensor) else weight


def _positive_weight(loss: ClassificationLoss, classes: Tensor) -> float | Tensor:
    """A number, or one for each of ``classes``."""
    weight = loss.positive_weight
    return weight.to(classes.device)[classes] if isinstance(weight, Tensor) else weight


def compute_dtype(x: Tensor) -> torch.dtype:
    """What losses of ``x`` are computed and returned in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _inside(at: Tensor, n: int, a: slice, h: slice) -> Tensor:
    """The columns of (image, anchor, ..., row, column) coordinates that lie in a piece,
    relative to its corner and without the image."""
    inside = (at[0] == n) & (at[1] >= a.start) & (at[1] < a.stop)
    inside &= (at[-2] >= h.start) & (at[-2] < h.stop)
    at = at[1:, inside]
    at[0] -= a.start
    at[-2] -= h.start
    return at
