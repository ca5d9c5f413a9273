"""The dense loss's kernel for CPUs: ``native.cpp``, compiled at first use and kept.

A plain C function called through ctypes: it needs a C++ compiler and nothing else, builds in two
seconds and works with every version of torch (an extension of torch's own loader would need ninja,
the headers of Python and of that torch, and half a minute).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from retina_plugin.cache import atomic_write, cache_root
from retina_plugin.losses.classification import (
    ClassificationLoss,
    FocalLoss,
    FocalLossStar,
    known_to_kernels,
)

__all__ = ["dense_sums", "supports", "unavailable"]

logger = logging.getLogger("retina_plugin")

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-std=c++17 -O3 -shared -fPIC -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math"
).split()
# for the processor at hand, in gcc's spelling, then in that of compilers that do not know it
_TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])

# the source's enum Kind; a product for the settings in use is cheaper than a power
_FOCAL, _FOCAL_STAR = 3, 4
_FOCAL_OF_GAMMA = {0.0: 0, 1.0: 1, 2.0: 2}
_DTYPES = (torch.float32, torch.bfloat16)


def supports(x: Tensor, loss: ClassificationLoss) -> bool:
    """Whether :func:`dense_sums` can take these logits and this loss."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    here = x.device.type == "cpu"
    return here and x.dtype in _DTYPES and dense and known_to_kernels(loss)


def unavailable() -> str | None:
    """Why there is no kernel on this machine; None where there is one. Compiles it if need be."""
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _arguments(loss: ClassificationLoss) -> tuple[int, float, float]:
    """(kind, gamma, beta) by which the kernel knows a loss."""
    if isinstance(loss, FocalLossStar):
        return _FOCAL_STAR, loss.gamma, loss.beta
    gamma = loss.gamma if isinstance(loss, FocalLoss) else 0.0
    return _FOCAL_OF_GAMMA.get(gamma, _FOCAL), gamma, 0.0


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
        x: (N, A*K, H, W) logits that :func:`supports` accepts.
        grad: where the gradient goes, times ``scale_N``; strides and dtype of ``x``, or ``x``
            itself, or None.
        labels: int16 (N, A, H, W), in memory (N, H, W, A) if ``x`` is channels_last: the class of
            a positive anchor, -1 for background, -2 for ignored.
        loss: what :func:`supports` accepts.
        weights_2K: (2, K) float32, alpha_t of the labels 0 and 1 by class.
        scale_N: (N,) float32.

    Returns:
        (N, 2) float64: background and foreground sum of each image, not scaled.
    """
    A, K = labels.shape[1], weights_2K.shape[1]
    places = x.shape[2] * x.shape[3]
    kind, gamma, beta = _arguments(loss)
    # a level of one place is in both layouts, and either is right for its labels
    channels_last = not x.is_contiguous()
    sums = torch.zeros(len(x), 2, dtype=torch.float64)
    weights_2K = weights_2K.contiguous()
    kernel = _library().retina_dense_loss
    for n, scale in enumerate(scale_N.tolist()):
        kernel(
            x[n].data_ptr(),
            None if grad is None else grad[n].data_ptr(),
            labels[n].data_ptr(),
            weights_2K[0].data_ptr(),
            weights_2K[1].data_ptr(),
            A,
            K,
            places,
            channels_last,
            x.dtype == torch.bfloat16,
            kind,
            gamma,
            beta,
            scale,
            torch.get_num_threads(),
            sums[n].data_ptr(),
        )
    return sums


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled source.

    Raises:
        RuntimeError: no compiler, or one that fails.
        OSError: a cache that cannot be written, or a library that cannot be loaded.
    """
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"]]
    compiler = next((c for c in candidates if c and shutil.which(c[0])), None)
    if compiler is None:
        looked_for = f"the variable CXX is {named}" if named else "c++ or g++ on PATH, or CXX"
        raise RuntimeError(f"no C++ compiler ({looked_for})")
    library = ctypes.CDLL(str(_build(compiler)))
    pointer, int64, int32, float32 = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_float,
    )
    function = library.retina_dense_loss
    function.restype = None
    function.argtypes = [pointer] * 5 + [int64] * 3 + [int32] * 3 + [float32] * 3 + [int32, pointer]
    return library


def _build(compiler: list[str]) -> Path:
    key = hashlib.sha256(_SOURCE.read_bytes())
    # a cache may be shared by machines: code for one's processor may not run on another's
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    key.update("\n".join([*compiler, version, *_FLAGS, _processor()]).encode())
    path = cache_root() / f"native-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    logger.info("Compiling %s with %s", _SOURCE.name, " ".join(compiler))
    with atomic_write(path) as built:
        for tuning in _TUNING:
            command = [*compiler, *_FLAGS, *tuning, str(_SOURCE), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                return path
        first = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
        raise RuntimeError(f"{compiler[0]} cannot compile {_SOURCE.name}: {first}")


def _processor() -> str:
    """What tells processors with different instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    # x86 and ARM name the set differently
    return next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
