"""The dense loss's kernel for CUDA: sums and gradient in one pass over raw logits, in Triton.

It reads a level's logits once and writes their gradient once, in either memory layout of a head's
output; labels are a thin map of anchors. The arithmetic is float32 for every type of logits. A
program owns a run of one image's memory and stores its partial sums, which are then added in
float64 in a fixed order: no atomics, so two runs agree in every bit. Nothing waits for the device.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from retina_plugin.losses.classification import (
    ClassificationLoss,
    FocalLoss,
    FocalLossStar,
    known_to_kernels,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    _IMPORT_ERROR: ImportError | None = error

    def _jit(kernel: Any) -> Any:
        return kernel  # never run: see unavailable
else:
    _IMPORT_ERROR = None
    _jit = triton.jit

__all__ = ["dense_sums", "scale_in_place", "supports", "unavailable"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WARPS = 4
_TILE = 2048  # entries that a program has in flight: 16 of each of its threads
_RUN = 16384  # entries of a program at most; its sums are float32


def supports(x: Tensor, loss: ClassificationLoss) -> bool:
    """Whether :func:`dense_sums` can take these logits and this loss."""
    here = x.is_cuda or _is_interpreted()
    return here and x.dtype in _DTYPES and _layout(x) is not None and known_to_kernels(loss)


def unavailable() -> str | None:
    """Why there is no kernel on this machine; None where there is one."""
    if _IMPORT_ERROR is not None:
        return f"Triton cannot be imported: {_IMPORT_ERROR}"
    if not (torch.cuda.is_available() or _is_interpreted()):
        return "Triton needs a CUDA device"
    return None


def dense_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    loss: ClassificationLoss,
    weights_2K: Tensor,
    scale_N: Tensor,
) -> Tensor:
    """Sum a loss over one level and write its gradient.

    Args:
        x: (N, A*K, H, W) logits that :func:`supports` accepts, channel ``a * K + k``.
        grad: where the gradient goes, times ``scale_N``; strides and dtype of ``x`` (float32 for
            float16), or ``x`` itself, or None.
        labels: int16 (N, A, H, W), in memory (N, H, W, A) if ``x`` is channels_last: the class of
            a positive anchor, -1 for background, -2 for ignored.
        loss: what :func:`supports` accepts; its alpha is not read.
        weights_2K: (2, K) float32, alpha_t of the labels 0 and 1 by class.
        scale_N: (N,) float32.

    Returns:
        (N, 2) float64: background and foreground sum of each image, not scaled.

    Raises:
        ValueError: tensors that do not fit together.
    """
    layout = _check(x, grad, labels, weights_2K, scale_N)
    (N, A, H, W), K = labels.shape, weights_2K.shape[1]
    if x.numel() == 0:
        return torch.zeros(N, 2, dtype=torch.float64, device=x.device)
    in_rows = layout == torch.channels_last
    kernel, plan = (_rows, _plan_rows) if in_rows else (_planes, _plan_planes)
    blocks, sizes = plan(A, K, H * W, x.element_size())
    partial_N2B = torch.empty(N, 2, blocks, dtype=torch.float32, device=x.device)
    with _on_device_of(x):
        kernel[(blocks, N)](
            x,
            x if grad is None else grad,
            labels,
            weights_2K.contiguous(),
            scale_N.contiguous(),
            partial_N2B,
            WRITE=grad is not None,
            num_warps=_WARPS,
            **sizes,
            **_constants(loss),
        )
    return partial_N2B.sum(dim=2, dtype=torch.float64)


def scale_in_place(grad: Tensor, ratio_N: Tensor) -> None:
    """Multiply each image's gradient by its number; memory is touched only where that is not 1.

    Args:
        grad: (N, C, H, W) of a floating dtype, any strides.
        ratio_N: (N,) on the same device, which decides: nothing waits for it.
    """
    if _layout(grad) is None:  # an image is not a run of memory
        grad.mul_(ratio_N.view(-1, 1, 1, 1))
    elif grad.numel():
        size = grad[0].numel()
        with _on_device_of(grad):
            _scale[(triton.cdiv(size, _RUN), len(grad))](
                grad, ratio_N.contiguous(), size, BLOCK=_TILE, STEPS=_RUN // _TILE, num_warps=_WARPS
            )


def _is_interpreted() -> bool:
    # decided when the kernels were decorated, not by what the environment says by now
    return _IMPORT_ERROR is None and not isinstance(_rows, triton.JITFunction)


def _layout(x: Tensor) -> torch.memory_format | None:
    # a 1x1 map is in both orders; then channels_last has the longer runs
    for layout in (torch.channels_last, torch.contiguous_format):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def _check(
    x: Tensor, grad: Tensor | None, labels: Tensor, weights_2K: Tensor, scale_N: Tensor
) -> torch.memory_format:
    """The layout of ``x``. Kernels would read and write out of bounds if this were wrong."""
    layout = _layout(x)
    if layout is None or x.dtype not in _DTYPES:
        raise ValueError(
            f"logits must be contiguous or channels_last and of {_DTYPES}, "
            f"got {x.dtype} with strides {x.stride()} for shape {tuple(x.shape)}"
        )
    (N, C, H, W), K = x.shape, weights_2K.shape[-1]
    grad_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    expected = [
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
            raise ValueError(f"{name} must be in the layout of the logits, {layout}")
    if C * H * W >= 2**31:
        raise ValueError(f"an image of {C * H * W} logits: offsets are 32 bit")
    if C % K:
        raise ValueError(f"{C} channels are not a multiple of {K} classes")
    return layout


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever its arguments are on
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _constants(loss: ClassificationLoss) -> dict[str, float | bool]:
    """What makes a kernel one of ``loss``."""
    star = isinstance(loss, FocalLossStar)
    gamma = loss.gamma if isinstance(loss, (FocalLoss, FocalLossStar)) else 0.0
    beta = loss.beta if isinstance(loss, FocalLossStar) else 0.0
    power = gamma * math.log2(math.e)
    high = torch.tensor(power, dtype=torch.float32).item()  # a CPU tensor: nothing to wait for
    return {
        "STAR": star,
        "GAMMA": gamma,
        "BETA": beta,
        "POWER_HIGH": high,
        "POWER_LOW": power - high,
        "FAR": (beta - 200.0) / gamma if star else -200.0,
        "PTX": not _is_interpreted() and torch.version.hip is None,
    }


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _plan_planes(A: int, K: int, HW: int, element_size: int) -> tuple[int, dict[str, int]]:
    """Programs of an image, and the sizes that :func:`_planes` takes."""
    widest = 16 // element_size  # a load of 128 bits
    vector = math.gcd(HW, widest)
    block = min(_power_of_2(HW), _TILE, _WARPS * 32 * widest)
    rows = min(_power_of_2(K), _TILE // block)
    chunks = triton.cdiv(K, max(rows, _RUN // block))
    planes = triton.cdiv(triton.cdiv(K, chunks), rows) * rows
    sizes = {"K": K, "VECTOR": vector, "BLOCK": block, "ROWS": rows, "PLANES": planes}
    blocks = A * triton.cdiv(K, planes) * triton.cdiv(HW, block)
    return blocks, {"A": A, "vectors": HW // vector, **sizes}


def _plan_rows(A: int, K: int, HW: int, element_size: int) -> tuple[int, dict[str, int]]:
    """Programs of an image, and the sizes that :func:`_rows` takes."""
    vector = math.gcd(K, 16 // element_size)
    groups = HW * A * K // vector
    block = min(_power_of_2(groups), max(1, _TILE // vector))
    steps = min(_RUN // _TILE, triton.cdiv(groups, block))
    # anchors that a program has a part in, if these are not too many to be loaded at once
    labels = min(_power_of_2(block * steps * vector // K + 2), _TILE)
    sizes = {"K": K, "VECTOR": vector, "BLOCK": block, "STEPS": steps, "LABELS": labels}
    return triton.cdiv(groups, block * steps), {"anchors": HW * A, **sizes}


# Kernels. Labels: class >= 0, -1 background, -2 ignored (a kernel cannot read a module's globals).


@_jit
def _terms(
    z,
    weight,
    STAR: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    POWER_HIGH: tl.constexpr,
    POWER_LOW: tl.constexpr,
    PTX: tl.constexpr,
):
    """weight l(x_t) and -weight dl/dx_t at x_t = -z, exactly 0 at FAR. Symbols: functional.py.

    The hardware's exp2 and log2 of plain products would be off by up to 1e-5. So exponents are kept
    as a sum of two numbers, and log(1 + e) is a polynomial.
    """
    LOG2E_HIGH: tl.constexpr = 1.44269502162933349609375
    LOG2E_LOW: tl.constexpr = 1.925963033500e-8
    LN2: tl.constexpr = 0.693147180559945309
    # l = [q^gamma] log(1 + exp(u))
    u = tl.fma(z, GAMMA, -BETA) if STAR else z
    # e = exp(-|u|). It is 0 beyond 200 anyway, and an infinite u would make the low part NaN.
    t = -tl.minimum(tl.abs(u), 200.0, propagate_nan=tl.PropagateNan.ALL)
    high = t * LOG2E_HIGH
    low = tl.fma(t, LOG2E_LOW, tl.fma(t, LOG2E_HIGH, -high))
    if STAR:  # what rounding took from u
        v = u + BETA
        rest = tl.where(t > -200.0, tl.fma(z, GAMMA, -v) + ((v - u) - BETA), 0.0)
        low = tl.fma(tl.where(u < 0, rest, -rest), LOG2E_HIGH, low)
    e = tl.exp2(high)
    e = tl.fma(e, low * LN2, e)
    # log(1 + e) = e + e^2 Q(e), minimax on [0, 1] with a relative error of 5e-9
    Q = tl.fma(e, -0.0033184716012328863, 0.020204579457640648)
    Q = tl.fma(e, Q, -0.057664431631565094)
    Q = tl.fma(e, Q, 0.10680554062128067)
    Q = tl.fma(e, Q, -0.15355394780635834)
    Q = tl.fma(e, Q, 0.19695399701595306)
    Q = tl.fma(e, Q, -0.24958586692810059)
    Q = tl.fma(e, Q, 0.33330512046813965)
    Q = tl.fma(e, Q, -0.4999993145465851)
    log1p = tl.fma(e * e, Q, e)
    softplus = tl.maximum(u, 0.0) + log1p  # -log p_t
    if PTX:  # a quotient would take six instructions, to scale divisors that 1 + e never is
        larger = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        larger = 1.0 / (1.0 + e)  # sigmoid(|u|)
    smaller = e * larger  # sigmoid(-|u|)
    q = tl.where(u < 0, smaller, larger)  # 1 - p_t
    if STAR:
        value = (weight * (1.0 / GAMMA)) * softplus  # Eq. 8
        slope = weight * q  # Eq. 11
    elif GAMMA == 0:
        value = weight * softplus
        slope = weight * q
    else:
        if GAMMA == 1:
            modulating = q
        elif GAMMA == 2:
            modulating = q * q
        else:  # exp(gamma (min(z, 0) - log1p)), the first product in two parts
            s = tl.where(u < 0, t, 0.0)
            high = s * POWER_HIGH
            low = tl.fma(s, POWER_LOW, tl.fma(s, POWER_HIGH, -high))
            modulating = tl.exp2(high) * tl.exp2(tl.fma(log1p, -POWER_HIGH, low))
        p_t = tl.where(u < 0, larger, smaller)
        modulating *= weight
        value = modulating * softplus  # Eq. 4
        slope = modulating * tl.fma(p_t * GAMMA, softplus, q)  # Eq. 10: no term is < 0
    return value, slope


@_jit
def _positives(
    x_ptr,
    grad_ptr,
    weight_ptr,
    at,
    label,
    mine,
    scale,
    K: tl.constexpr,
    WRITE: tl.constexpr,
    STAR: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    POWER_HIGH: tl.constexpr,
    POWER_LOW: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sum of the entries of label 1 at ``at`` where ``mine``, and their gradient. Where that is
    written, the logit is read from the gradient, which may have taken its place."""
    source_ptr = grad_ptr if WRITE else x_ptr
    x = tl.load(source_ptr + at, mask=mine, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + K + label, mask=mine, other=0.0)
    value, slope = _terms(-x, weight, STAR, GAMMA, BETA, POWER_HIGH, POWER_LOW, PTX)
    if WRITE:
        tl.store(grad_ptr + at, (-slope * scale).to(grad_ptr.dtype.element_ty), mask=mine)
    return tl.sum(value)


@_jit
def _planes(
    x_ptr,
    grad_ptr,
    label_ptr,
    weight_ptr,
    scale_ptr,
    partial_ptr,
    A,
    vectors,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    WRITE: tl.constexpr,
    STAR: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    POWER_HIGH: tl.constexpr,
    POWER_LOW: tl.constexpr,
    FAR: tl.constexpr,
    PTX: tl.constexpr,
):
    """Contiguous (N, A, K, H*W): a program takes BLOCK places of PLANES classes of an anchor, and
    loads their labels once. Grid: (A * runs of classes * blocks of places, N)."""
    HW = vectors * VECTOR  # so that the compiler knows how well planes are aligned
    blocks = tl.cdiv(HW, BLOCK)
    chunks: tl.constexpr = (K + PLANES - 1) // PLANES
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    anchor = image * A + program // (blocks * chunks)
    first = (program // blocks) % chunks * PLANES
    place = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < HW
    label = tl.load(label_ptr + anchor * HW + place, mask=inside, other=-2).to(tl.int32)
    scale = tl.load(scale_ptr + image)
    x_ptr += anchor * K * HW
    grad_ptr += anchor * K * HW
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for row in range(first, tl.minimum(first + PLANES, K), ROWS):
        k = row + tl.arange(0, ROWS)[:, None]
        at = k * HW + place
        mask = inside if K % ROWS == 0 else inside & (k < K)
        x = tl.load(x_ptr + at, mask=mask, other=FAR).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0)
        z = tl.where((label == -2) | (label == k), FAR, x)
        value, slope = _terms(z, weight, STAR, GAMMA, BETA, POWER_HIGH, POWER_LOW, PTX)
        total += value
        if WRITE:  # a positive entry keeps its logit until below
            slope = tl.where(label == k, x, slope * scale)
            tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=mask)
    foreground = 0.0
    mine = (label >= first) & (label < first + PLANES)
    if tl.max(mine.to(tl.int32)) > 0:
        tl.debug_barrier()  # the store above may have been another thread's
        foreground = _positives(
            x_ptr,
            grad_ptr,
            weight_ptr,
            label * HW + place,
            label,
            mine,
            scale,
            K,
            WRITE,
            STAR,
            GAMMA,
            BETA,
            POWER_HIGH,
            POWER_LOW,
            PTX,
        )
    partial_ptr += image * 2 * tl.num_programs(0) + program
    tl.store(partial_ptr, tl.sum(total))
    tl.store(partial_ptr + tl.num_programs(0), foreground)


@_jit
def _rows(
    x_ptr,
    grad_ptr,
    label_ptr,
    weight_ptr,
    scale_ptr,
    partial_ptr,
    anchors,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LABELS: tl.constexpr,
    WRITE: tl.constexpr,
    STAR: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
    POWER_HIGH: tl.constexpr,
    POWER_LOW: tl.constexpr,
    FAR: tl.constexpr,
    PTX: tl.constexpr,
):
    """channels_last, (N, H*W*A, K): a program takes STEPS times BLOCK groups of VECTOR classes of
    an anchor, so that a label and a division by K come once a group. Grid: (blocks, N)."""
    per_anchor: tl.constexpr = K // VECTOR
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    groups = anchors * per_anchor
    scale = tl.load(scale_ptr + image)
    label_ptr += image * anchors
    x_ptr += image * groups * VECTOR
    grad_ptr += image * groups * VECTOR
    lane = tl.arange(0, VECTOR)[None, :]
    first = program * STEPS * BLOCK
    total = tl.zeros([BLOCK, VECTOR], dtype=tl.float32)
    for step in range(STEPS):
        group = first + step * BLOCK + tl.arange(0, BLOCK)[:, None]
        inside = group < groups
        label = tl.load(label_ptr + group // per_anchor, mask=inside, other=-2).to(tl.int32)
        at = group * VECTOR + lane
        k = (group % per_anchor) * VECTOR + lane
        x = tl.load(x_ptr + at, mask=inside, other=FAR).to(tl.float32)
        weight = tl.load(weight_ptr + k)
        z = tl.where((label == -2) | (label == k), FAR, x)
        value, slope = _terms(z, weight, STAR, GAMMA, BETA, POWER_HIGH, POWER_LOW, PTX)
        total += value
        if WRITE:  # a positive entry keeps its logit until below
            slope = tl.where(label == k, x, slope * scale)
            tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the store above may have been another thread's
    foreground = 0.0
    begin = first * VECTOR
    end = tl.minimum(first + STEPS * BLOCK, groups) * VECTOR
    for start in range(begin // K, (end - 1) // K + 1, LABELS):
        anchor = start + tl.arange(0, LABELS)
        label = tl.load(label_ptr + anchor, mask=anchor < anchors, other=-1).to(tl.int32)
        at = anchor * K + label
        mine = (label >= 0) & (at >= begin) & (at < end)
        foreground += _positives(
            x_ptr,
            grad_ptr,
            weight_ptr,
            at,
            label,
            mine,
            scale,
            K,
            WRITE,
            STAR,
            GAMMA,
            BETA,
            POWER_HIGH,
            POWER_LOW,
            PTX,
        )
    partial_ptr += image * 2 * tl.num_programs(0) + program
    tl.store(partial_ptr, tl.sum(total))
    tl.store(partial_ptr + tl.num_programs(0), foreground)


@_jit
def _scale(grad_ptr, ratio_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Grid: (blocks, N)."""
    image = tl.program_id(1).to(tl.int64)
    ratio = tl.load(ratio_ptr + image)
    if ratio != 1:
        grad_ptr += image * size
        for step in range(STEPS):
            at = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < size)
            tl.store(grad_ptr + at, (grad * ratio).to(grad.dtype), mask=at < size)
