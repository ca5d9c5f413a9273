"""Which backend computes the dense loss: ``MODEL.RETINANET.LOSS_BACKEND``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice
from retina_plugin.losses.classification import CLS_LOSS_REGISTRY, ClassificationLoss
from retina_plugin.losses.targets import BACKGROUND, IGNORED

from . import eager, native, triton
from .interface import AlphaWeights, Backend

__all__ = ["check_backend", "choose_backend", "is_available", "unavailable_reason"]

logger = logging.getLogger("retina_plugin")

_KEY = "MODEL.RETINANET.LOSS_BACKEND"
_KERNELS: dict[str, Backend] = {"native": native, "triton": triton}


def check_backend(name: str, *, here: bool = True) -> None:
    """Check a value of ``MODEL.RETINANET.LOSS_BACKEND``.

    Args:
        name: the value.
        here: whether it must also run on this machine. (A config of another machine's training may
            be used here for inference, which needs no loss.)

    Raises:
        ConfigError: an unknown name, or a kernel that cannot run here, with the reason.
    """
    check_choice(_KEY, name, KEYS[_KEY].choices)
    if here and name in _KERNELS and (reason := unavailable_reason(name)):
        raise ConfigError(f"{_KEY} {name} is not available: {reason}; set it to auto")


def choose_backend(name: str, x: Tensor, loss: ClassificationLoss) -> Backend:
    """The backend for the logits ``x`` of a level: the named one, or for "auto" the fastest.

    Raises:
        ConfigError: an unknown name, or a kernel that cannot run here or cannot compute this loss
            of these logits.
    """
    if name == "auto":
        for kernel_name, kernel in _KERNELS.items():
            if kernel.supports(x, loss) and is_available(kernel_name):
                return kernel
        return eager
    check_backend(name)
    if name == "eager":
        return eager
    if not _KERNELS[name].supports(x, loss):
        raise ConfigError(
            f"{_KEY} {name} cannot do {loss} of {x.dtype} logits on {x.device.type}: set it to auto"
        )
    return _KERNELS[name]


@functools.cache
def is_available(name: str) -> bool:
    """Whether a kernel can be used here. Logs the reason once if it cannot."""
    reason = unavailable_reason(name)
    if reason:
        logger.warning("No %s kernel for the loss, so it is slower: %s", name, reason)
    return reason is None


@functools.cache
def unavailable_reason(name: str) -> str | None:
    """Why a kernel cannot be used here; None if it can and agrees with "eager".

    The self-test computes a small level with every loss that declares a formula: the tests of this
    package cannot cover all compilers and drivers.
    """
    kernel = _KERNELS[name]
    if reason := kernel.unavailable():
        return reason
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    N, A, K, H, W = 2, 3, 5, 7, 11
    x = torch.linspace(-30, 30, N * A * K * H * W, device=device).view(N, A * K, H, W)
    labels = (torch.arange(N * A * H * W, device=device) % 29 - 20).clamp(BACKGROUND, K - 1)
    labels = labels.short().view(N, A, H, W)
    labels[:, :, ::3, ::4] = IGNORED
    scale_N = torch.tensor([1.0, 0.25], device=device)
    for loss in _losses_with_a_formula():
        if not kernel.supports(x, loss):
            continue
        grad, expected_grad = torch.empty_like(x), torch.empty_like(x)
        rest = labels, False, loss, AlphaWeights.of(loss, K, device), scale_N
        try:
            sums = kernel.dense_sums(x, grad, *rest)
        except Exception as error:  # whatever a compiler or a driver raises
            return f"it fails on this machine: {' '.join(str(error).split())[:300]}"
        expected = eager.dense_sums(x, expected_grad, *rest)
        near = torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-12)
        if not near or not torch.allclose(sums, expected, rtol=1e-5, atol=0):
            return f"its result for {loss} is wrong on this machine"
    return None


def _losses_with_a_formula() -> Iterator[ClassificationLoss]:
    for _, cls in CLS_LOSS_REGISTRY:
        if "formula" in vars(cls):
            yield from (cls(**arguments) for arguments in cls.self_test_arguments)
