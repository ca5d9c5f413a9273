"""What the next iteration depends on, beside the model and the optimizer.

All of it is tensors and plain Python values, which a reader of checkpoints can admit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from retina_plugin.data.loader import ResumableLoader

__all__ = [
    "gather_processes",
    "load_random_state",
    "load_storage_state",
    "random_state",
    "restore_process",
    "storage_state",
]

_WINDOW = 20  # iterations over which Detectron2's writers take the median
# Measured anew in each process. Detectron2 logs the first one from the third iteration on.
_TIMES = ("time", "eta_seconds")


def random_state() -> dict[str, Any]:
    """The generators of python, numpy, torch and, if a GPU is used, that of this process's GPU."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def load_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators into a :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_processes(model: nn.Module, loaders: Sequence[Any]) -> list[dict[str, Any]]:
    """The state of each process: generators, data loaders, buffers. Empty except in the main one.

    Buffers are those that differ from the main process's, e.g. batch norm's statistics: each
    process has its own.

    Args:
        model: not wrapped by DistributedDataParallel.
        loaders: of batches. One that is no :class:`ResumableLoader` has no state.
    """
    own: dict[str, Any] = {
        "random": random_state(),
        "loaders": [x.state_dict() if isinstance(x, ResumableLoader) else None for x in loaders],
    }
    buffers = {}
    if comm.get_world_size() > 1:
        parameters = {name for name, _ in model.named_parameters()}
        buffers = {k: v.cpu() for k, v in model.state_dict().items() if k not in parameters}
    processes = comm.gather({**own, "buffers": buffers})
    for process in processes:
        process["buffers"] = {
            k: v for k, v in process["buffers"].items() if not torch.equal(v, buffers[k])
        }
    return processes


def restore_process(
    processes: Sequence[Mapping[str, Any]], model: nn.Module, loaders: Sequence[Any]
) -> None:
    """Restore this process's part of :func:`gather_processes`, apart from the generators.

    With another number of processes, the data goes on behind the process that was furthest.
    """
    same = len(processes) == comm.get_world_size()
    if same:
        model.load_state_dict(processes[comm.get_rank()]["buffers"], strict=False)
    for number, loader in enumerate(loaders):
        states = [p["loaders"][number] for p in processes if number < len(p["loaders"])]
        if not isinstance(loader, ResumableLoader) or not states or None in states:
            continue
        if same:
            loader.load_state_dict(states[comm.get_rank()])
        else:
            loader.load_state_dict(max(states, key=lambda state: state["position"]))


def storage_state(storage: EventStorage) -> list[tuple[str, bool, list[tuple[float, int]]]]:
    """Name, smoothing hint and last values of each scalar, which the next log lines average."""
    state = []
    for name in storage.latest():
        values = storage.history(name).values()
        recent = [(v, int(i)) for v, i in values[-1000:] if i > values[-1][1] - _WINDOW]
        if name not in _TIMES:
            state.append((name, storage.smoothing_hints()[name], recent))
    return state


def load_storage_state(storage: EventStorage, state: Sequence[Sequence[Any]]) -> None:
    """Put the values of :func:`storage_state` into an empty storage."""
    for name, hint, values in state:
        for value, iteration in values:
            storage.put_scalar(name, value, smoothing_hint=hint, cur_iter=iteration)
