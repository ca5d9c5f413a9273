"""The jitted functions of :mod:`.triton`. Labels and formula kinds are those of the package."""

from __future__ import annotations

from typing import Any

from retina_plugin.losses.classification import FormulaKind
from retina_plugin.losses.targets import BACKGROUND, IGNORED

try:
    import triton
    import triton.language as tl
except ImportError as error:
    IMPORT_ERROR: ImportError | None = error

    def _jit(kernel: Any) -> Any:
        return kernel  # never called
else:
    IMPORT_ERROR = None
    _jit = triton.jit
    # a kernel reads a global variable only if it is a constexpr
    _BACKGROUND, _IGNORED = tl.constexpr(BACKGROUND), tl.constexpr(IGNORED)
    _FOCAL_STAR = tl.constexpr(int(FormulaKind.FOCAL_STAR))

__all__ = ["IMPORT_ERROR", "KINDS", "is_interpreted", "planes", "rows", "scale"]

KINDS = (FormulaKind.FOCAL, FormulaKind.FOCAL_STAR)  # the formulas that _terms knows


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. The environment decides this at import time."""
    return IMPORT_ERROR is None and not isinstance(rows, triton.JITFunction)


@_jit
def _terms(
    z,
    weight,
    KIND: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
):
    """weight l(x_t) and -weight dl/dx_t at x_t = -z; both are exactly 0 at a logit of FAR. The
    symbols are those of functional.py.

    The hardware's exp2 and log2 of rounded products would have errors of up to 1e-5. Therefore
    exponents are sums high + low, and log(1 + e) is a polynomial.
    """
    STAR: tl.constexpr = KIND == _FOCAL_STAR
    LOG2E_HIGH: tl.constexpr = 1.44269502162933349609375
    LOG2E_LOW: tl.constexpr = 1.925963033500e-8
    LN2: tl.constexpr = 0.693147180559945309
    # l = [q^gamma] log(1 + exp(u))
    u = tl.fma(z, GAMMA, -BETA) if STAR else z
    # e = exp(-|u|). It is 0 beyond 200, and the low part of an infinite u would be NaN.
    t = -tl.minimum(tl.abs(u), 200.0, propagate_nan=tl.PropagateNan.ALL)
    high = t * LOG2E_HIGH
    low = tl.fma(t, LOG2E_LOW, tl.fma(t, LOG2E_HIGH, -high))
    if STAR:  # the rounding error of u
        v = u + BETA
        rest = tl.where(t > -200.0, tl.fma(z, GAMMA, -v) + ((v - u) - BETA), 0.0)
        low = tl.fma(tl.where(u < 0, rest, -rest), LOG2E_HIGH, low)
    e = tl.exp2(high)
    e = tl.fma(e, low * LN2, e)
    # log(1 + e) = e + e^2 Q(e), minimax polynomial on [0, 1], relative error 5e-9
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
        else:  # exp(gamma (min(z, 0) - log1p)) as a power of 2
            # gamma log2(e) = POWER_HIGH + POWER_LOW, the first with the 24 bits of a float32
            # (Veltkamp's splitting in the compiler's float64)
            POWER: tl.constexpr = GAMMA * 1.4426950408889634
            SPLIT: tl.constexpr = POWER * 536870913.0  # 2^29 + 1
            POWER_HIGH: tl.constexpr = SPLIT - (SPLIT - POWER)
            POWER_LOW: tl.constexpr = POWER - POWER_HIGH
            s = tl.where(u < 0, t, 0.0)
            high = s * POWER_HIGH
            low = tl.fma(s, POWER_LOW, tl.fma(s, POWER_HIGH, -high))
            modulating = tl.exp2(high) * tl.exp2(tl.fma(log1p, -POWER_HIGH, low))
        p_t = tl.where(u < 0, larger, smaller)
        modulating *= weight
        value = modulating * softplus  # Eq. 4
        slope = modulating * tl.fma(p_t * GAMMA, softplus, q)  # Eq. 10, no difference
    return value, slope


@_jit
def _positive_sum(
    x_ptr,
    grad_ptr,
    weight_ptr,
    at,
    label,
    mask,
    scale,
    K: tl.constexpr,
    WRITE: tl.constexpr,
    KIND: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
):
    """Sum of the loss of the entries with label 1 at ``at`` where ``mask``; writes their gradient.

    With ``WRITE``, the logits are read from where the gradient goes: there the caller left them."""
    source_ptr = grad_ptr if WRITE else x_ptr
    x = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + K + label, mask=mask, other=0.0)
    value, slope = _terms(-x, weight, KIND, GAMMA, BETA)
    if WRITE:
        tl.store(grad_ptr + at, (-slope * scale).to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(value)


@_jit
def planes(
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
    KIND: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
):
    """Contiguous (N, A, K, H*W): a program takes BLOCK positions of PLANES classes of an anchor and
    loads their labels once. Grid: (A * runs of classes * blocks of positions, N)."""
    FAR: tl.constexpr = (BETA - 200.0) / GAMMA if KIND == _FOCAL_STAR else -200.0
    HW = vectors * VECTOR  # tells the compiler how planes are aligned
    blocks = tl.cdiv(HW, BLOCK)
    chunks: tl.constexpr = (K + PLANES - 1) // PLANES
    program = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    anchor = image * A + program // (blocks * chunks)
    first = (program // blocks) % chunks * PLANES
    position = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = position < HW
    label = tl.load(label_ptr + anchor * HW + position, mask=inside, other=_IGNORED).to(tl.int32)
    scale = tl.load(scale_ptr + image)
    x_ptr += anchor * K * HW
    grad_ptr += anchor * K * HW
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for row in range(first, tl.minimum(first + PLANES, K), ROWS):
        k = row + tl.arange(0, ROWS)[:, None]
        at = k * HW + position
        mask = inside if K % ROWS == 0 else inside & (k < K)
        x = tl.load(x_ptr + at, mask=mask, other=FAR).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0)
        z = tl.where((label == _IGNORED) | (label == k), FAR, x)
        value, slope = _terms(z, weight, KIND, GAMMA, BETA)
        total += value
        if WRITE:  # a positive entry keeps its logit for _positive_sum
            slope = tl.where(label == k, x, slope * scale)
            tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=mask)
    foreground = 0.0
    is_own = (label >= first) & (label < first + PLANES)
    if tl.max(is_own.to(tl.int32)) > 0:
        tl.debug_barrier()  # another thread may have stored the logit
        foreground = _positive_sum(
            x_ptr,
            grad_ptr,
            weight_ptr,
            label * HW + position,
            label,
            is_own,
            scale,
            K,
            WRITE,
            KIND,
            GAMMA,
            BETA,
        )
    partial_ptr += image * 2 * tl.num_programs(0) + program
    tl.store(partial_ptr, tl.sum(total))
    tl.store(partial_ptr + tl.num_programs(0), foreground)


@_jit
def rows(
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
    KIND: tl.constexpr,
    GAMMA: tl.constexpr,
    BETA: tl.constexpr,
):
    """channels_last (N, H*W*A, K): a program takes STEPS times BLOCK groups of VECTOR classes of an
    anchor, with one label and one division by K for each group. Grid: (blocks, N)."""
    FAR: tl.constexpr = (BETA - 200.0) / GAMMA if KIND == _FOCAL_STAR else -200.0
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
        label = tl.load(label_ptr + group // per_anchor, mask=inside, other=_IGNORED).to(tl.int32)
        at = group * VECTOR + lane
        k = (group % per_anchor) * VECTOR + lane
        x = tl.load(x_ptr + at, mask=inside, other=FAR).to(tl.float32)
        weight = tl.load(weight_ptr + k)
        z = tl.where((label == _IGNORED) | (label == k), FAR, x)
        value, slope = _terms(z, weight, KIND, GAMMA, BETA)
        total += value
        if WRITE:  # a positive entry keeps its logit for _positive_sum
            slope = tl.where(label == k, x, slope * scale)
            tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # another thread may have stored the logit
    foreground = 0.0
    begin = first * VECTOR
    end = tl.minimum(first + STEPS * BLOCK, groups) * VECTOR
    for start in range(begin // K, (end - 1) // K + 1, LABELS):
        anchor = start + tl.arange(0, LABELS)
        label = tl.load(label_ptr + anchor, mask=anchor < anchors, other=_BACKGROUND).to(tl.int32)
        at = anchor * K + label
        is_own = (label >= 0) & (at >= begin) & (at < end)
        foreground += _positive_sum(
            x_ptr,
            grad_ptr,
            weight_ptr,
            at,
            label,
            is_own,
            scale,
            K,
            WRITE,
            KIND,
            GAMMA,
            BETA,
        )
    partial_ptr += image * 2 * tl.num_programs(0) + program
    tl.store(partial_ptr, tl.sum(total))
    tl.store(partial_ptr + tl.num_programs(0), foreground)


@_jit
def scale(grad_ptr, ratio_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Multiply the gradient of an image, ``size`` entries, by its ratio. Grid: (blocks, N)."""
    image = tl.program_id(1).to(tl.int64)
    ratio = tl.load(ratio_ptr + image)
    if ratio != 1:
        grad_ptr += image * size
        for step in range(STEPS):
            at = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < size)
            tl.store(grad_ptr + at, (grad * ratio).to(grad.dtype), mask=at < size)
