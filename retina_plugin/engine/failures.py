"""What a process says when it fails: one line, also at the end of torchrun's report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import torch

__all__ = ["KILLED", "one_line", "record_error"]

KILLED = (
    "was killed, most often because the memory was full (`dmesg` or the scheduler's log says so)"
)


def record_error(line: str) -> None:
    """Put ``line`` into torchrun's error file: it ends the report that torchrun prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    message = {"message": {"message": line, "extraInfo": extra}}
    with contextlib.suppress(OSError):  # the line itself is printed anyway
        Path(path).write_text(json.dumps(message))


def one_line(error: Exception) -> str | None:
    """The error of a machine that is too small, as one line with the fix; None: another error."""
    text = str(error)
    killed = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", text)
    if (killed is not None and "Bus error" in killed[2]) or "</torch_" in text:
        return (
            "error: the shared memory of this machine (/dev/shm) is full, through which the data "
            "loader's workers hand over images: enlarge it (docker run --shm-size 8g), or lower "
            "DATALOADER.NUM_WORKERS (0 needs none)"
        )
    if killed is not None:
        return (
            f"error: a worker of the data loader (process {killed[1]}) {KILLED}: lower "
            "DATALOADER.NUM_WORKERS or the image size, or give the job more memory; --resume goes "
            "on from the last checkpoint"
        )
    if "received 0 items of ancdata" in text or "Too many open files" in text:
        return (
            "error: too many open files: raise the limit (`ulimit -n 65536`), or lower "
            "DATALOADER.NUM_WORKERS"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"error: the GPU's memory is full ({text.splitlines()[0]}): raise SOLVER.ACCUMULATE, "
            "set MODEL.ACTIVATION_CHECKPOINTING True or SOLVER.AMP.ENABLED True, or take smaller "
            "images"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return (
            "error: the memory of this machine is full: lower DATALOADER.NUM_WORKERS, raise "
            "SOLVER.ACCUMULATE, or take smaller images"
        )
    return None
