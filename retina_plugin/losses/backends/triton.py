"""The dense loss's kernel for CUDA GPUs, in Triton: sums and gradient in one pass over raw logits.

It has never run on a GPU. The tests run it in Triton's interpreter and compile it for CUDA; the
self-test in :mod:`.select` compares it with plain PyTorch before it is used.

It reads the logits of a level once and writes their gradient once (a positive logit is read again).
The logits may be contiguous or channels_last. The arithmetic is float32 for every dtype of logits.
Each program handles one part of one image and stores its partial sums. These are added in float64
in a fixed order, without atomics, so repeated calls give the same bits. The host never waits for
the GPU.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retina_plugin.losses.classification import ClassificationLoss

from . import triton_kernels as kernels
from .interface import AlphaWeights

__all__ = ["Plan", "dense_sums", "plan", "scale_in_place", "supports", "unavailable"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WARPS = 4
_TILE = 2048  # entries that a program computes at a time: 16 for each of its threads
_RUN = 16384  # entries of a program at most, because its sums are float32


def unavailable() -> str | None:
    """Why there is no kernel on this machine; None if there is one."""
    if kernels.IMPORT_ERROR is not None:
        return f"Triton cannot be imported: {kernels.IMPORT_ERROR}"
    if not (torch.cuda.is_available() or kernels.is_interpreted()):
        return "Triton needs a CUDA device"
    return None


def supports(x: Tensor, loss: ClassificationLoss) -> bool:
    """Contiguous or channels_last logits of up to 32 bits on a GPU; a known formula."""
    formula = loss.kernel_formula()
    known = formula is not None and formula.kind in kernels.KINDS
    on_gpu = x.is_cuda or kernels.is_interpreted()
    return on_gpu and x.dtype in _DTYPES and _is_dense(x) and known


def dense_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    channels_last: bool,
    loss: ClassificationLoss,
    alpha: AlphaWeights,
    scale_N: Tensor,
) -> Tensor:
    """See :meth:`.interface.Backend.dense_sums`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    formula = loss.kernel_formula()
    assert formula is not None  # by supports()
    _check(x, grad, labels, channels_last, alpha.by_class_2K, scale_N)
    (N, A, H, W), K = labels.shape, alpha.by_class_2K.shape[1]
    if x.numel() == 0:
        return torch.zeros(N, 2, dtype=torch.float64, device=x.device)
    kernel, blocks, sizes = plan(channels_last, A, K, H * W, x.element_size())
    partial_N2B = torch.empty(N, 2, blocks, dtype=torch.float32, device=x.device)
    with _on_device_of(x):
        kernel[(blocks, N)](
            x,
            x if grad is None else grad,
            labels,
            alpha.by_class_2K,
            scale_N.contiguous(),
            partial_N2B,
            **sizes,
            WRITE=grad is not None,
            KIND=int(formula.kind),
            GAMMA=formula.gamma,
            BETA=formula.beta,
            num_warps=_WARPS,
        )
    return partial_N2B.sum(dim=2, dtype=torch.float64)


def scale_in_place(grad: Tensor, ratio_N: Tensor) -> None:
    """Multiply the gradient of each image by its ratio, without a pass over it where that is 1.

    Args:
        grad: (N, C, H, W) of a floating dtype, any strides.
        ratio_N: (N,) on the same device, where it is compared with 1: nothing synchronises.
    """
    if not _is_dense(grad):  # an image is not one run of memory
        grad.mul_(ratio_N.view(-1, 1, 1, 1))
    elif grad.numel():
        size = grad[0].numel()
        grid = (math.ceil(size / _RUN), len(grad))
        with _on_device_of(grad):
            kernels.scale[grid](
                grad, ratio_N.contiguous(), size, BLOCK=_TILE, STEPS=_RUN // _TILE, num_warps=_WARPS
            )


class Plan(NamedTuple):
    """How a kernel is launched for a level."""

    kernel: Any  # a jitted function
    blocks: int  # programs of an image
    sizes: dict[str, int]  # the kernel's arguments that depend on the shape


def plan(channels_last: bool, A: int, K: int, HW: int, element_size: int) -> Plan:
    """The launch for A anchors of K classes at HW positions of ``element_size`` bytes an entry."""
    return (_plan_rows if channels_last else _plan_planes)(A, K, HW, element_size)


def _plan_planes(A: int, K: int, HW: int, element_size: int) -> Plan:
    widest = 16 // element_size  # entries of a load of 128 bits
    vector = math.gcd(HW, widest)
    block = min(_power_of_2(HW), _TILE, _WARPS * 32 * widest)
    rows = min(_power_of_2(K), _TILE // block)
    chunks = math.ceil(K / max(rows, _RUN // block))
    planes = math.ceil(math.ceil(K / chunks) / rows) * rows
    sizes = {"K": K, "VECTOR": vector, "BLOCK": block, "ROWS": rows, "PLANES": planes}
    blocks = A * math.ceil(K / planes) * math.ceil(HW / block)
    return Plan(kernels.planes, blocks, {"A": A, "vectors": HW // vector, **sizes})


def _plan_rows(A: int, K: int, HW: int, element_size: int) -> Plan:
    vector = math.gcd(K, 16 // element_size)
    groups = HW * A * K // vector
    block = min(_power_of_2(groups), max(1, _TILE // vector))
    steps = min(_RUN // _TILE, math.ceil(groups / block))
    # the anchors of a program's entries, if these are not too many to load at once
    labels = min(_power_of_2(block * steps * vector // K + 2), _TILE)
    sizes = {"K": K, "VECTOR": vector, "BLOCK": block, "STEPS": steps, "LABELS": labels}
    return Plan(kernels.rows, math.ceil(groups / (block * steps)), {"anchors": HW * A, **sizes})


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    channels_last: bool,
    weights_2K: Tensor,
    scale_N: Tensor,
) -> None:
    """Kernels would read and write out of bounds if a shape or a layout were wrong."""
    if not _is_dense(x) or x.dtype not in _DTYPES:
        raise ValueError(
            f"logits must be contiguous or channels_last and of {_DTYPES}, "
            f"got {x.dtype} with strides {x.stride()} for shape {tuple(x.shape)}"
        )
    (N, C, H, W), K = x.shape, weights_2K.shape[-1]
    if C % K:
        raise ValueError(f"{C} channels are not a multiple of {K} classes")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    expected = [
        ("logits", x, (N, C, H, W), x.dtype),
        ("labels", labels, (N, C // K, H, W), torch.int16),
        ("weights_2K", weights_2K, (2, K), torch.float32),
        ("scale_N", scale_N, (N,), torch.float32),
    ]
    if grad is not None:
        expected.append(("grad", grad, (N, C, H, W), grad_dtype))
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be {shape} {dtype} on {x.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if tensor.dim() == 4 and not tensor.is_contiguous(memory_format=layout):
            raise ValueError(f"{name} must be in the memory layout {layout}")
    if C * H * W >= 2**31:
        raise ValueError(f"an image of {C * H * W} logits: offsets are 32 bit")


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever device its arguments are on
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
