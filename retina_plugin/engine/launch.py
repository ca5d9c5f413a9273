"""One process a GPU: by Detectron2's ``launch``, or those that ``torchrun`` has started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm

from retina_plugin.errors import ConfigError

__all__ = ["run", "under_torchrun"]


def under_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run(main: Callable[..., None], args: argparse.Namespace, num_gpus: int, *rest: Any) -> None:
    """Call ``main(args, *rest)`` in every process.

    Args:
        main: a module-level function, since processes are spawned.
        args: with ``num_machines``, ``machine_rank`` and ``dist_url`` (see Detectron2's parser).
        num_gpus: processes of this machine; 0 and 1 stay in this process.

    Raises:
        ConfigError: more processes than GPUs under ``torchrun``.
    """
    if not under_torchrun():
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
                f"torchrun --nproc_per_node {num_processes}: there are {num_gpus} GPUs for these "
                "processes; start as many as there are, or train on the CPU with --num-gpus 0"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend="nccl" if num_gpus else "gloo")
    _create_local_process_group(num_processes)
    try:
        main(args, *rest)
    finally:
        torch.distributed.destroy_process_group()


def _create_local_process_group(num_processes: int) -> None:
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    # Detectron2 v0.6 has it inside launch() only
    rank = torch.distributed.get_rank()
    for first in range(0, torch.distributed.get_world_size(), num_processes):
        ranks = list(range(first, first + num_processes))
        group = torch.distributed.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
