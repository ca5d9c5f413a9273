"""The dense loss's kernel for CPUs: ``native.cpp``, compiled at first use and cached.

A plain C function called through ctypes: it needs only a C++ compiler, builds in two seconds and
works with every version of torch. (An extension by torch's own loader would need ninja, the headers
of Python and of that torch, and half a minute.)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from retina_plugin.cache import atomic_write, cache_root
from retina_plugin.losses.classification import ClassificationLoss, FormulaKind
from retina_plugin.losses.targets import BACKGROUND, IGNORED

from .interface import AlphaWeights

__all__ = ["dense_sums", "supports", "unavailable"]

logger = logging.getLogger("retina_plugin")

_SOURCE = Path(__file__).with_suffix(".cpp")
_KINDS = (FormulaKind.FOCAL, FormulaKind.FOCAL_STAR)  # the formulas that the source knows
_FLAGS = [
    *"-std=c++17 -O3 -shared -fPIC -pthread -fopenmp-simd".split(),
    *"-fno-math-errno -fno-trapping-math".split(),
    f"-DRETINA_BACKGROUND={BACKGROUND}",
    f"-DRETINA_IGNORED={IGNORED}",
    *(f"-DRETINA_{kind.name}={kind.value}" for kind in _KINDS),
]
# For this machine's processor: gcc's option on x86, then the one on ARM, then none.
_TUNING: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
_DTYPES = (torch.float32, torch.bfloat16)


def unavailable() -> str | None:
    """Why there is no kernel on this machine; None if there is one. Compiles it if necessary."""
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def supports(x: Tensor, loss: ClassificationLoss) -> bool:
    """Contiguous or channels_last float32 or bfloat16 on the CPU; a known formula."""
    formula = loss.kernel_formula()
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    known = formula is not None and formula.kind in _KINDS
    return x.device.type == "cpu" and x.dtype in _DTYPES and dense and known


def dense_sums(
    x: Tensor,
    grad: Tensor | None,
    labels: Tensor,
    channels_last: bool,
    loss: ClassificationLoss,
    alpha: AlphaWeights,
    scale_N: Tensor,
) -> Tensor:
    """See :meth:`.interface.Backend.dense_sums`."""
    formula = loss.kernel_formula()
    assert formula is not None  # by supports()
    A, places = labels.shape[1], x.shape[2] * x.shape[3]
    weights_2K = alpha.by_class_2K
    sums = torch.zeros(len(x), 2, dtype=torch.float64)
    kernel = _library().retina_dense_loss
    for n, scale in enumerate(scale_N.tolist()):
        kernel(
            x[n].data_ptr(),
            None if grad is None else grad[n].data_ptr(),
            labels[n].data_ptr(),
            weights_2K[0].data_ptr(),
            weights_2K[1].data_ptr(),
            A,
            weights_2K.shape[1],
            places,
            channels_last,
            x.dtype == torch.bfloat16,
            formula.kind,
            formula.gamma,
            formula.beta,
            scale,
            torch.get_num_threads(),
            sums[n].data_ptr(),
        )
    return sums


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled source.

    Raises:
        RuntimeError: no compiler is found, or it fails.
        OSError: the cache cannot be written, or the library cannot be loaded.
    """
    cxx = os.environ.get("CXX")
    candidates = [shlex.split(cxx)] if cxx else [["c++"], ["g++"]]
    compiler = next((c for c in candidates if c and shutil.which(c[0])), None)
    if compiler is None:
        looked_for = f"the variable CXX is {cxx}" if cxx else "c++ or g++ on PATH, or CXX"
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
    """The compiled library, which ends with its digest: a linker ignores what follows."""
    key = hashlib.sha256(b"ends with its digest" + _SOURCE.read_bytes())
    key.update("\n".join([*compiler, *_FLAGS, _target(compiler)]).encode())
    path = cache_root() / f"native-{key.hexdigest()[:16]}.so"
    # To load a library that was cut short ends the process.
    if _is_whole(path):
        return path
    again = " again: the cached library is damaged" if path.exists() else ""
    logger.info("Compiling %s with %s%s", _SOURCE.name, " ".join(compiler), again)
    try:
        with atomic_write(path) as built:
            _compile(compiler, built)
            built.write_bytes(built.read_bytes() + _digest(built.read_bytes()))
    except OSError as error:
        raise RuntimeError(
            f"cannot write the compiled kernel to {path} ({error.strerror or error}): name another "
            "folder in the environment variable RETINA_PLUGIN_CACHE"
        ) from None
    return path


def _compile(compiler: list[str], built: Path) -> None:
    for tuning in _TUNING:
        command = [*compiler, *_FLAGS, *tuning, str(_SOURCE), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return
    first = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
    raise RuntimeError(f"{compiler[0]} cannot compile {_SOURCE.name}: {first}")


def _digest(library: bytes) -> bytes:
    return hashlib.sha256(library).digest()


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = len(content) - len(_digest(b""))
    return _digest(content[:size]) == content[size:]


def _target(compiler: list[str]) -> str:
    """The compiler's predefined macros: its version, and the instruction sets that it will use.

    Machines may share a cache, and code for one processor may not run on another.
    """
    macros = ""
    for tuning in _TUNING:
        command = [*compiler, *tuning, "-dM", "-E", "-x", "c++", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            macros = result.stdout
            break
    return macros
