"""Time and memory of one training step on this machine, for ``retina doctor``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from retina_plugin.doctor import StepCost
from retina_plugin.errors import ConfigError

from .setup import register_user_parts
from .trainer import Trainer

__all__ = ["measure_step"]

_STEPS = 3
_ENOUGH = 60.0  # seconds after which no other step is begun


def measure_step(
    cfg: CfgNode, processes: int = 1, clock: Callable[[], float] = time.perf_counter
) -> StepCost:
    """Train for a few steps, as ``retina train`` would, and throw the result away.

    The steps run in a process of their own: its highest memory is that of the training, and if
    memory runs out, only that process is killed. The first step, which warms caches, is not
    counted.

    Args:
        cfg: a checked config.
        processes: that would train; one of them is measured, with its part of the batch (after
            ``SOLVER.REFERENCE_WORLD_SIZE``) and without the exchange of gradients.
        clock: gives seconds; ``time.process_time`` where other programs disturb the wall clock.

    Raises:
        ConfigError: the process was killed, or the training cannot start.
    """
    cfg = Trainer.auto_scale_workers(cfg, processes)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(cfg.clone(), processes, clock, sender))
    child.start()
    sender.close()  # so that its end is seen here when the child dies
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        raise ConfigError(_death(cfg, child.exitcode)) from None
    finally:
        child.kill()
        child.join()
    if isinstance(result, str):
        raise ConfigError(result)
    return result


def _death(cfg: CfgNode, exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return (
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: the process of the timed step was "
            f"ended by {name}{reason}: lower it together with SOLVER.BASE_LR, set "
            "SOLVER.ACCUMULATE, or leave the step out with --quick"
        )
    return f"the process of the timed step ended with status {exit_code}, see above"


def _run(cfg: CfgNode, processes: int, clock: Callable[[], float], sender: Connection) -> None:
    logging.disable(logging.WARNING)  # what a training says has no place between findings
    try:
        register_user_parts(cfg)
        with tempfile.TemporaryDirectory() as folder:
            cfg.defrost()
            cfg.OUTPUT_DIR = folder
            sender.send(_measure(cfg, processes, clock))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        sender.send(f"{name}{lines[-1]}")


def _measure(cfg: CfgNode, processes: int, clock: Callable[[], float]) -> StepCost:
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0  # the config is scaled already
    cfg.SOLVER.IMS_PER_BATCH = max(cfg.SOLVER.IMS_PER_BATCH // processes, cfg.SOLVER.ACCUMULATE)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    is_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    times: list[float] = []
    with EventStorage(0) as trainer.storage:
        while len(times) <= _STEPS and sum(times) < _ENOUGH:
            trainer.iter = trainer.storage.iter = len(times)
            start = clock()
            trainer.run_step()
            if is_gpu:
                torch.cuda.synchronize()
            times.append(clock() - start)
    threads = torch.get_num_threads()
    device = f"cpu ({threads} thread{'s' * (threads > 1)})"
    memory, total = _peak_memory(), _total_memory()
    if is_gpu:
        device = torch.cuda.get_device_name()
        memory = torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties(0).total_memory
    return StepCost(
        seconds=statistics.median(times[1:] or times),
        memory_bytes=memory,
        total_bytes=total,
        images=cfg.SOLVER.IMS_PER_BATCH,
        processes=processes,
        device=device,
    )


def _peak_memory() -> int:
    """The highest resident memory of this process, in bytes."""
    try:
        # not getrusage, which counts what the process that started this one had
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _total_memory() -> int:
    """The memory of the machine, or of the container if that has less; in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total
