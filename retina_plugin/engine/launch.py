"""One process for each GPU, started by Detectron2's ``launch`` or by ``torchrun``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import (  # type: ignore[attr-defined]
    ProcessExitedException,
    _prctl_pr_set_pdeathsig,
)

from retina_plugin.errors import ConfigError

from .failures import KILLED, one_line, record_error
from .heartbeat import Heartbeat
from .signals import EXIT_CODE, pass_signals_on

__all__ = ["run", "under_torchrun"]

# A process that computes metrics alone lets the others wait in a collective operation. So PyTorch's
# own time limit for one is that many times longer than ours, which knows the difference.
_LONGEST_WAIT = 10


def under_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run(
    main: Callable[..., None],
    args: argparse.Namespace,
    num_gpus: int,
    *rest: Any,
    timeout: float = 600,
) -> None:
    """Call ``main(args, *rest)`` in every process.

    If one of several processes fails, its error is the last line that the user sees, whichever
    process it was: the others, which lose their connection to it, say nothing of their own.

    Args:
        main: a function of a module, because spawned processes import it.
        args: with ``num_machines``, ``machine_rank`` and ``dist_url`` (see Detectron2's parser).
        num_gpus: processes to start on this machine. With 0 or 1, none is started, and ``main``
            runs in this one.
        timeout: seconds after which a process that hangs ends the others (see :class:`.Heartbeat`).

    Raises:
        ConfigError: ``torchrun`` started more processes than there are GPUs, or ``timeout`` is not
            positive.
    """
    if timeout <= 0:
        raise ConfigError(f"SOLVER.PROCESS_TIMEOUT must be more than 0 seconds, got {timeout}")
    longest_wait = timedelta(seconds=_LONGEST_WAIT * timeout)
    if not under_torchrun():
        starts = max(num_gpus, 1) * args.num_machines > 1  # else `launch` only calls it
        try:
            # Only then: the data loader's workers are processes of this one too.
            with pass_signals_on() if starts else contextlib.nullcontext():
                launch(
                    _process,
                    max(num_gpus, 1),
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(main, timeout, args, *rest),
                    timeout=longest_wait,
                )
        except ProcessExitedException as error:
            if error.signal_name is None:
                sys.exit(error.exit_code)  # the process has printed why
            sys.exit(f"error: process {error.error_pid} {KILLED} ({error.signal_name})")
        return
    # Without it, processes go on training when torchrun itself is killed.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if num_gpus:
        if num_processes > num_gpus:
            raise ConfigError(
                f"torchrun --nproc_per_node {num_processes}: this machine has {num_gpus} GPUs; "
                "start as many processes, or train on the CPU with --num-gpus 0"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=longest_wait))
    if world_size == num_processes:
        # torchrun keeps the store. After a restart, PyTorch 2.14 finds the addresses of the ranks
        # that have ended in it, and tries to connect to them. (Machines count their own restarts,
        # so on several there is no such name: see docs/multi_process.md.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
    torch.distributed.init_process_group(
        backend="nccl" if num_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=longest_wait,
    )
    comm.create_local_process_group(num_processes)
    _process(main, timeout, args, *rest)
    torch.distributed.destroy_process_group()


def _process(main: Callable[..., None], timeout: float, *args: Any) -> None:
    """The whole life of one process: ``main(*args)``, and how it ends."""
    several = comm.get_world_size() > 1
    with contextlib.ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(timeout)) if several else None
        try:
            if several:
                comm.synchronize()  # each has read who the others are: from here on, one may end
            main(*args)
        except SystemExit as end:
            if isinstance(end.code, str):
                _report(heartbeat, end.code)
            elif end.code == EXIT_CODE:
                _report(heartbeat, "error: a signal stopped it, and it is saved")
            raise
        except Exception as error:
            line = one_line(error)
            if line is None and heartbeat is not None and _lost_connection(error):
                line = _why_lost(heartbeat, timeout)
            _report(heartbeat, line or f"{type(error).__name__}: {error}")
            if line is None:
                raise
            sys.exit(line if line.startswith("error: ") else 1)


def _report(heartbeat: Heartbeat | None, line: str) -> None:
    record_error(line)
    if heartbeat is not None:
        heartbeat.report_failure(line)


def _why_lost(heartbeat: Heartbeat, timeout: float) -> str | None:
    """What ended the process that this one has lost. None: nothing is known.

    It begins with "error: " unless that process has printed it on this machine.
    """
    failed = heartbeat.find_failed()
    if failed is None:
        return None
    if not failed.failure:
        return f"error: {failed.name} {KILLED}"
    if failed.host != socket.gethostname() and comm.get_local_rank() == 0:
        return f"error: {failed.name} failed: {failed.failure.removeprefix('error: ')}"
    return f"{failed.name} failed: {failed.failure}"


def _lost_connection(error: Exception) -> bool:
    """Whether a collective operation failed because of another process."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|Connection (closed|reset)|Broken pipe", str(error)) is not None
    )
