"""The sum of a classification loss over every anchor of a batch.

Let l be the elementwise loss, and w_neg and w_pos the alpha weights of the labels 0 and 1. A
positive anchor has label 1 for the class of its box and label 0 for all other classes. The loss is

    sum of w_neg l(-x) over the entries with label 0, of anchors that are not ignored
    + sum of w_pos l(x) over the entries with label 1

Almost every entry has label 0. So one pass over the raw head output computes the first sum, without
a one-hot target, a permute or a concatenation of levels; the labels are one small integer for each
anchor. The derivative has a closed form (Appendix B), so the forward pass writes the gradient and
saves nothing else: the extra memory is 1x the logits, or nothing if the gradient replaces them. A
backend does the pass over a level, see :mod:`retina_plugin.losses.backends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina_plugin.errors import ConfigError

from .backends import eager, triton
from .backends.interface import AlphaWeights, compute_dtype
from .backends.select import choose_backend, is_available
from .classification import ClassificationLoss
from .targets import DenseTargets, LabelMap

__all__ = ["DenseLoss", "anchor_losses", "dense_classification_loss"]


class DenseLoss(NamedTuple):
    """Sums over the anchors of each image, not normalised. Each (N,)."""

    total: Tensor  # differentiable
    foreground: Tensor  # its part from the entries with label 1, detached
    background: Tensor  # its part from the entries with label 0, detached


def dense_classification_loss(
    logits: Sequence[Tensor],
    targets: DenseTargets,
    loss: ClassificationLoss,
    num_classes: int,
    *,
    backend: str = "auto",
    expected_grad_N: Tensor | None = None,
    in_place: bool = False,
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
        backend: "eager" (plain PyTorch), "native" (C++ for CPUs), "triton" (CUDA), or "auto", the
            fastest that is available. The kernels compute cross entropy, FL and FL*.
        expected_grad_N: (N,), not 0: the gradient of ``total`` that ``backward`` will receive, if
            it is known already. The logits' gradient is written with this factor, which saves a
            pass over it in ``backward``; if another factor comes, it is corrected. None: 1.
        in_place: write the gradient over the logits, which saves memory of their size. Code that
            reads the logits afterwards reads the gradient; an operation that has saved them for its
            own backward pass gets autograd's error.

    Returns:
        Sums by image, float32 (float64 for float64 logits). Ignored anchors add exactly 0.
        ``total`` can be differentiated once, and ``backward`` can run once: it hands out the
        gradient that the forward pass wrote.

    Raises:
        ValueError: logits that do not fit ``num_classes`` or ``targets``, a label that is not one
            of K classes (on a GPU, a device-side assertion), leaf tensors with ``in_place``.
        ConfigError: a ``backend`` that is unknown, unavailable or cannot compute this loss; float16
            logits with ``in_place``.

    Example:
        loss = FocalLoss(alpha=0.25, gamma=2.0)
        sums = dense_classification_loss(logits, targets, loss, num_classes=80)
        loss_cls = sums.total.sum() / targets.num_positives_N().sum().clamp(min=1)
    """
    _check_logits(logits, targets, num_classes)
    # asked here, because grad mode is always off inside a Function's forward
    want_grad = torch.is_grad_enabled()
    if in_place and want_grad:
        _check_in_place(logits)
    scale_N = logits[0].new_ones(targets.num_images, dtype=torch.float32)
    if expected_grad_N is not None:
        scale_N = expected_grad_N.detach().to(compute_dtype(logits[0]))
    call = _Call(targets, loss, num_classes, backend, want_grad, in_place)
    return DenseLoss(*_DenseLossFunction.apply(call, scale_N, *logits))


def anchor_losses(
    logits: Sequence[Tensor],
    targets: DenseTargets,
    loss: ClassificationLoss,
    num_classes: int,
) -> Tensor:
    """The loss of each anchor, for samplers that choose anchors by it. No gradient.

    Args: as for :func:`dense_classification_loss`.

    Returns:
        (N, R) float32 (float64 for float64 logits), summed over classes; -inf where ignored.
    """
    _check_logits(logits, targets, num_classes)
    with torch.no_grad(), torch.autocast(logits[0].device.type, enabled=False):
        alpha = AlphaWeights.of(loss, num_classes, logits[0].device)
        maps = targets.label_maps(logits, num_classes)
        levels = [eager.anchor_losses(x, m.labels_NAHW, loss, alpha) for x, m in zip(logits, maps)]
        return torch.cat(levels, dim=1)


class _Call(NamedTuple):
    """The arguments of :func:`dense_classification_loss` that have no gradient."""

    targets: DenseTargets
    loss: ClassificationLoss
    num_classes: int
    backend: str
    want_grad: bool
    in_place: bool


class _DenseLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, scale_N: Tensor, *logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = tuple(x.detach() for x in logits)
        grads = [
            _gradient_buffer(x, call.in_place) if call.want_grad and needed else None
            for x, needed in zip(logits, ctx.needs_input_grad[2:])
        ]
        with torch.autocast(logits[0].device.type, enabled=False):
            alpha = AlphaWeights.of(call.loss, call.num_classes, logits[0].device)
            maps = call.targets.label_maps(logits, call.num_classes)
            levels = [
                _level_sums(x, grad, label_map, call, alpha, scale_N)
                for x, grad, label_map in zip(logits, grads, maps)
            ]
            sums_N2 = torch.stack(levels).sum(dim=0)
        ctx.grads, ctx.dtypes = grads, [x.dtype for x in logits]
        ctx.scale_N, ctx.backend = scale_N, call.backend
        background_N, foreground_N = sums_N2.unbind(dim=1)
        out_dtype = compute_dtype(logits[0])
        total_N = (foreground_N + background_N).to(out_dtype)
        foreground_N, background_N = foreground_N.to(out_dtype), background_N.to(out_dtype)
        ctx.mark_non_differentiable(foreground_N, background_N)
        return total_N, foreground_N, background_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the dense loss hands out its gradient at the first backward pass: "
                "compute the loss again instead of calling backward() twice on it"
            )
        grads, ctx.grads = ctx.grads, None
        ratio_N = grad_N / ctx.scale_N
        for grad in grads:
            if grad is not None:
                _scale_by_image(grad, ratio_N, ctx.backend)
        return (
            None,
            None,
            *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)),
        )


def _check_logits(logits: Sequence[Tensor], targets: DenseTargets, num_classes: int) -> None:
    for x in logits:
        if x.dim() != 4 or x.shape[0] != targets.num_images or x.shape[1] % num_classes:
            raise ValueError(
                f"logits of shape {tuple(x.shape)} are not (N, A*K, H, W) with "
                f"N={targets.num_images} and K={num_classes}"
            )
    if num_classes > torch.iinfo(torch.int16).max:
        raise ValueError(f"{num_classes} classes: labels are 16 bit, so at most 32767")


def _check_in_place(logits: Sequence[Tensor]) -> None:
    if any(x.dtype == torch.float16 for x in logits):
        raise ConfigError(
            "MODEL.RETINANET.LOSS_IN_PLACE: float16 cannot hold the gradient before it is scaled: "
            "set SOLVER.AMP.PRECISION bfloat16"
        )
    if any(x.requires_grad and x.is_leaf for x in logits):
        raise ValueError("in_place: logits that are leaves would become their own gradient")


def _gradient_buffer(x: Tensor, in_place: bool) -> Tensor:
    if in_place:
        # kernels write through pointers: autograd has to be told
        torch.autograd.graph.increment_version(x)
        return x
    # float16 would underflow: a loss scaler's factor comes in backward, after this is written
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty_like(x, dtype=dtype)


def _level_sums(
    x: Tensor,
    grad: Tensor | None,
    label_map: LabelMap,
    call: _Call,
    alpha: AlphaWeights,
    scale_N: Tensor,
) -> Tensor:
    """(N, 2) background and foreground sums of a level."""
    backend = choose_backend(call.backend, x, call.loss)
    return backend.dense_sums(x, grad, *label_map, call.loss, alpha, scale_N)


def _scale_by_image(grad: Tensor, ratio_N: Tensor, backend: str) -> None:
    """Multiply the gradient of each image in place, unless all factors are 1."""
    if grad.is_cuda and backend != "eager" and is_available("triton"):
        triton.scale_in_place(grad, ratio_N)  # compares on the device: no synchronisation
    elif grad.device.type != "cpu" or bool((ratio_N != 1).any()):
        grad.mul_(ratio_N.view(-1, 1, 1, 1))
