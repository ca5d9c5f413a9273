"""One process for each GPU, started by Detectron2's ``launch`` or by ``torchrun``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm

from retina_plugin.errors import ConfigError

from .signals import pass_signals_on

__all__ = ["run", "under_torchrun"]


def under_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run(main: Callable[..., None], args: argparse.Namespace, num_gpus: int, *rest: Any) -> None:
    """Call ``main(args, *rest)`` in every process.

    Args:
        main: a function of a module, because spawned processes import it.
        args: with ``num_machines``, ``machine_rank`` and ``dist_url`` (see Detectron2's parser).
        num_gpus: processes to start on this machine. With 0 or 1, none is started, and ``main``
            runs in this one.

    Raises:
        ConfigError: ``torchrun`` started more processes than there are GPUs.
    """
    if not under_torchrun():
        with pass_signals_on():
            launch(
                main,
                max(num_gpus, 1),
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, *rest),
            )
        return
    num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if num_gpus:
        if num_processes > num_gpus:
            raise ConfigError(
                f"torchrun --nproc_per_node {num_processes}: this machine has {num_gpus} GPUs; "
                "start as many processes, or train on the CPU with --num-gpus 0"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend="nccl" if num_gpus else "gloo")
    comm.create_local_process_group(num_processes)
    try:
        main(args, *rest)
    finally:
        torch.distributed.destroy_process_group()
