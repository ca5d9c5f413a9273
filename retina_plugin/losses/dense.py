"""The one place that sums a classification loss over every anchor of a batch.

Almost every anchor is background, so with l the elementwise loss and w the alpha weights

    sum of loss = sum over all (anchor, class) that are neither positive nor ignored of w_neg l(-x)
                + sum over positives of w_pos l(x)

is one pass over the raw head output. No one-hot target, no permute and no concatenation of levels
is made; the labels are one small integer for each anchor. The derivative is known in closed form
(Appendix B), so the forward pass writes the gradient and keeps nothing else: extra memory is 1x the
logits, or nothing where the gradient takes their place. The pass over a level is a backend's:
:mod:`~retina_plugin.losses.eager`, :mod:`~retina_plugin.losses.native` or
:mod:`~retina_plugin.losses.triton_kernels`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retina_plugin.errors import ConfigError

from .backends import eager, native
from .backends import triton as triton_kernels
from .backends.eager import compute_dtype
from .classification import ClassificationLoss, CrossEntropy, FocalLoss, FocalLossStar
from .targets import BACKGROUND, IGNORED, DenseTargets

__all__ = [
    "BACKENDS",
    "DenseLoss",
    "anchor_losses",
    "check_backend",
    "dense_classification_loss",
]

logger = logging.getLogger("retina_plugin")

_KERNELS = {"native": native, "triton": triton_kernels}
BACKENDS = ("auto", "eager", *_KERNELS)


class DenseLoss(NamedTuple):
    """Sums over each image's anchors, not yet divided by anything. Each (N,)."""

    total: Tensor  # differentiable
    foreground: Tensor  # detached part of the entries with label 1
    background: Tensor  # detached part of the entries with label 0


def check_backend(name: str, *, here: bool = True) -> None:
    """Whether there is such a ``MODEL.RETINANET.LOSS_BACKEND``, and ``here``, on this machine.

    Raises:
        ConfigError: an unknown name, or a kernel that cannot run here, with the reason.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"MODEL.RETINANET.LOSS_BACKEND: no '{name}'; known: {', '.join(BACKENDS)}"
        )
    if here and name in _KERNELS and (reason := _obstacle(name)):
        raise ConfigError(
            f"MODEL.RETINANET.LOSS_BACKEND {name} is not available: {reason}; set it to auto"
        )


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
        backend: "eager" (plain PyTorch), "native" (compiled for the CPU), "triton" (CUDA), or
            "auto", the fastest that can. The kernels cover cross entropy, FL and FL*.
        expected_grad_N: (N,) what ``total`` will be multiplied by on its way to the final loss,
            not 0. The gradient is written with this factor, which spares a pass over it in
            ``backward``; it is corrected where ``backward`` brings another one. None: 1.
        in_place: write the gradient over the logits and so spare its memory. The logits are lost:
            what reads them afterwards reads the gradient, and what had saved them for a gradient
            of its own gets autograd's error.

    Returns:
        Sums by image, float32 (float64 for float64 logits). Ignored anchors add exactly nothing.
        ``total`` can be differentiated once, and its graph used once: the gradient that the
        forward pass wrote is given away.

    Raises:
        ValueError: logits that do not fit ``num_classes`` or ``targets``, a class that is not one
            of K (on an accelerator an assertion of the device); leaves in place.
        ConfigError: what ``backend`` or ``in_place`` cannot do.
    """
    _check_logits(logits, targets, num_classes)
    # inside a Function's forward the grad mode is off, whatever it was outside
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
    """The loss of each anchor by itself, to choose anchors by; no gradient.

    Args: as :func:`dense_classification_loss`.

    Returns:
        (N, R) float32 (float64 for float64 logits), summed over classes; -inf where ignored.
    """
    _check_logits(logits, targets, num_classes)
    with torch.no_grad(), torch.autocast(logits[0].device.type, enabled=False):
        maps = targets.label_maps(logits, num_classes)
        levels = [eager.anchor_losses(x, m, loss, num_classes) for x, m in zip(logits, maps)]
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
            _gradient_of(x, call.in_place) if call.want_grad and needed else None
            for x, needed in zip(logits, ctx.needs_input_grad[2:])
        ]
        with torch.autocast(logits[0].device.type, enabled=False):
            maps = call.targets.label_maps(logits, call.num_classes)
            weights_2K = _weights(call.loss, call.num_classes, logits[0].device)
            levels = [
                _level_sums(x, grad, labels, call, weights_2K, scale_N)
                for x, grad, labels in zip(logits, grads, maps)
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
                "the dense loss gives its gradient away at the first backward pass: "
                "compute the loss again instead of calling backward() twice on it"
            )
        grads, ctx.grads = ctx.grads, None
        ratio_N = grad_N / ctx.scale_N
        for grad in grads:
            if grad is not None:
                _scale(grad, ratio_N, ctx.backend)
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


def _gradient_of(x: Tensor, in_place: bool) -> Tensor:
    if in_place:
        torch.autograd.graph.increment_version(x)  # kernels write behind autograd's back
        return x
    # float16 would lose what a loss scaler, whose factor only comes in backward, keeps alive
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty_like(x, dtype=dtype)


def _level_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    call: _Call,
    weights_2K: Tensor,
    scale_N: Tensor,
) -> Tensor:
    """(N, 2) background and foreground sums of a level, by the backend that is to do it."""
    name = _choose(x, call)
    if name == "eager":
        return eager.dense_sums(x, grad, labels, call.loss, call.num_classes, scale_N)
    return _KERNELS[name].dense_sums(x, grad, labels, call.loss, weights_2K, scale_N)


def _choose(x: Tensor, call: _Call) -> str:
    if call.backend == "auto":
        for name, kernel in _KERNELS.items():
            if kernel.supports(x, call.loss) and not _missing(name):
                return name
        return "eager"
    check_backend(call.backend)
    if call.backend in _KERNELS and not _KERNELS[call.backend].supports(x, call.loss):
        raise ConfigError(
            f"MODEL.RETINANET.LOSS_BACKEND {call.backend} cannot do {call.loss} of {x.dtype} "
            f"logits on {x.device.type}: set it to auto"
        )
    return call.backend


@functools.cache
def _missing(name: str) -> bool:
    """Whether a kernel cannot be had here; the log says so once."""
    reason = _obstacle(name)
    if reason:
        logger.warning("No %s kernel for the loss, so it is slower: %s", name, reason)
    return reason is not None


@functools.cache
def _obstacle(name: str) -> str | None:
    """Why a kernel cannot be used here; None where it can and computes what "eager" does.

    Compilers and drivers differ more than tests can cover: a few entries are computed before a
    training depends on it.
    """
    kernel = _KERNELS[name]
    if reason := kernel.unavailable():
        return reason
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    N, A, K, H, W = 2, 3, 5, 7, 11
    x = torch.linspace(-30, 30, N * A * K * H * W, device=device).view(N, A * K, H, W)
    labels = (torch.arange(N * A * H * W, device=device) % 29 - 20).clamp(-2, K - 1)
    labels = torch.where(labels == IGNORED, BACKGROUND, labels).short().view(N, A, H, W)
    labels[:, :, ::3, ::4] = IGNORED
    scale_N = torch.tensor([1.0, 0.25], device=device)
    for loss in (FocalLoss(0.25, 2.0), FocalLoss(0.25, 0.5), CrossEntropy(), FocalLossStar()):
        grad, expected_grad = torch.empty_like(x), torch.empty_like(x)
        try:
            sums = kernel.dense_sums(x, grad, labels, loss, _weights(loss, K, x.device), scale_N)
        except Exception as error:  # whatever a compiler or a driver raises
            return f"it fails on this machine: {' '.join(str(error).split())[:300]}"
        expected = eager.dense_sums(x, expected_grad, labels, loss, K, scale_N)
        near = torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-12)
        if not near or not torch.allclose(sums, expected, rtol=1e-5, atol=0):
            return f"its result for {loss} is wrong on this machine"
    return None


def _weights(loss: ClassificationLoss, num_classes: int, device: torch.device) -> Tensor:
    """(2, K) float32: alpha_t by class of an entry with label 0, and with label 1."""
    weights_2K = torch.empty(2, num_classes, device=device)
    for row, weight in zip(weights_2K, (loss.negative_weight, loss.positive_weight)):
        if isinstance(weight, Tensor):
            weight = weight.pin_memory() if device.type == "cuda" else weight
            row.copy_(weight, non_blocking=True)
        else:
            row.fill_(weight)
    return weights_2K


def _scale(grad: Tensor, ratio_N: Tensor, backend: str) -> None:
    """Multiply each image's gradient in place, where there is something to do."""
    if grad.is_cuda and backend != "eager" and not _missing("triton"):
        triton_kernels.scale_in_place(grad, ratio_N)  # decides on the device
    elif grad.device.type != "cpu" or bool((ratio_N != 1).any()):
        grad.mul_(ratio_N.view(-1, 1, 1, 1))
