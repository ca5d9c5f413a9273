"""What times depend on: the machine, the versions of the libraries, the C library's allocator."""

from __future__ import annotations

import ctypes
import importlib
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.case import clock

__all__ = ["describe_machine", "detectron2_is_compiled", "keep_heap", "processor"]

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def describe_machine(device: str, threads: int, heap_kept: bool) -> dict[str, Any]:
    """Processor or GPU, settings and versions, as they stand in the JSON file."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "threads": threads,
        "clock": clock(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2's compiled parts": "yes" if detectron2_is_compiled() else "no",
        "malloc": "heap kept" if heap_kept else "default",
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def detectron2_is_compiled() -> bool:
    """Whether Detectron2 has its C++ parts. Without them its COCO evaluator is pycocotools'."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return False
    return True


def keep_heap() -> bool:
    """Let glibc keep freed memory for this process; False if there is no glibc.

    By default glibc returns large blocks to the system when they are freed, and the next tensor
    pays a page fault for each of its pages: 0.2 s for 256 MB, which are filled in 0.03 s. Ratios
    would mostly compare how much memory is allocated, which favours ours.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
