"""What a config asks of the machine: GPUs, precisions, a compiler, a batch that can be split."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice

from .findings import Finding, Severity

__all__ = [
    "check_batch_size",
    "check_compiler",
    "check_num_gpus",
    "check_precision",
    "check_tracking",
    "device_type",
]


def device_type(cfg: CfgNode) -> str:
    """ "cuda" or "cpu": where a run of ``cfg`` on this machine takes place."""
    wanted = torch.device(cfg.MODEL.DEVICE).type
    return "cpu" if wanted == "cuda" and not torch.cuda.device_count() else wanted


def check_num_gpus(cfg: CfgNode, num_gpus: int | None) -> Iterator[Finding]:
    """The machine has the GPUs that ``--num-gpus`` asks for, and ``MODEL.DEVICE`` uses them.

    Args:
        num_gpus: the number that the user asked for. None: all of this machine.
    """
    available = torch.cuda.device_count()
    where = f"--num-gpus {num_gpus}"
    if num_gpus is None:
        return
    if num_gpus < 0:
        yield _error(where, "ask for 0 (the CPU) or more")
    elif num_gpus > available:
        yield _error(
            where,
            f"this machine has {available}; ask for at most that, or leave --num-gpus out to use "
            "all" + ("" if available else " (here: the CPU)"),
        )
    elif num_gpus > 0 and not cfg.MODEL.DEVICE.startswith("cuda"):
        yield _error(f"{where} with MODEL.DEVICE {cfg.MODEL.DEVICE}", "leave one of them out")


def check_precision(cfg: CfgNode, eval_only: bool = False) -> Iterator[Finding]:
    """``TEST.PRECISION`` and, for a training, ``SOLVER.AMP.PRECISION`` exist on the device."""
    precisions = {"TEST.PRECISION": cfg.TEST.PRECISION}
    if cfg.SOLVER.AMP.ENABLED and not eval_only:
        precisions["SOLVER.AMP.PRECISION"] = cfg.SOLVER.AMP.PRECISION
    for key, name in precisions.items():
        try:
            check_choice(key, name, KEYS[key].choices)
        except ConfigError as error:
            yield _error(key, str(error).removeprefix(f"{key}: "))
            continue
        # float16 works on the CPU, but it is slower than float32 there.
        if name == "float16" and device_type(cfg) == "cpu":
            yield _error(key, "float16 needs a GPU", f"set {key} bfloat16")


def check_compiler(device: str) -> Iterator[Finding]:
    """``torch.compile`` has a C++ compiler ("cpu") or Triton ("cuda")."""
    key, fix = "MODEL.COMPILE", "set MODEL.COMPILE False"
    if device == "cpu":
        # The compiler that PyTorch looks for.
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(name) is None:
            yield _error(
                key,
                f"needs a C++ compiler, and there is no {name}",
                f"install one, name it in the environment variable CXX, or {fix}",
            )
    elif importlib.util.find_spec("triton") is None:
        yield _error(key, "needs Triton", f"install triton, or {fix}")


def check_batch_size(cfg: CfgNode, world_size: int) -> Iterator[Finding]:
    """``SOLVER.IMS_PER_BATCH`` can be divided by the processes and their ``SOLVER.ACCUMULATE``."""
    batch, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    parts = world_size * passes
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        of_passes = f" of SOLVER.ACCUMULATE {passes} passes" if passes > 1 else ""
        yield _error(
            "SOLVER.IMS_PER_BATCH",
            f"{batch} cannot be split over {world_size} "
            f"process{'es' if world_size > 1 else ''}{of_passes}",
            f"set it to {nearest} and SOLVER.BASE_LR to {cfg.SOLVER.BASE_LR * nearest / batch:g}",
        )


def check_tracking(cfg: CfgNode) -> Iterator[Finding]:
    """The clients of ``TRACKING`` are installed. They are not imported."""
    for name in cfg.TRACKING or ():
        if not isinstance(name, str):
            continue  # check_values says so
        spec = importlib.util.find_spec(name)
        # Without an origin, it is a folder of that name: wandb writes one beside a script.
        if spec is None or spec.origin is None:
            fix = f"pip install {name}, or take it out of TRACKING"
            yield _error("TRACKING", f"{name} is not installed", fix)


def _error(where: str, what: str, fix: str = "") -> Finding:
    return Finding(Severity.ERROR, where, what, fix)
