"""The losses of several iterations, logged in one transfer from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

__all__ = ["LossLog"]


class _Entry(NamedTuple):
    """What is logged of an iteration."""

    iteration: int
    data_time: float  # seconds
    losses: dict[str, float]


class LossLog:
    """What ``SimpleTrainer.write_metrics`` logs, later and for several iterations at once.

    ``add`` only launches work on the device; ``write`` waits for it, once, and the processes
    exchange what they have, once.
    """

    def __init__(self) -> None:
        self._added: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def add(self, iteration: int, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Keep the losses of an iteration (scalars) and its seconds of waiting for data."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._added.append((iteration, data_time, tuple(losses), values))

    def write(self) -> None:
        """Put what was added into the event storage, each number under its iteration.

        Losses are means over the processes, ``data_time`` is the longest one. To be called by all
        processes, which have added the same iterations.

        Raises:
            FloatingPointError: a loss is not finite, with the first such iteration, in the main
                process; the iterations before it are in the storage.
        """
        added, self._added = self._added, []
        if not added:
            return
        values = torch.cat([x[-1] for x in added]).cpu().split([len(x[-1]) for x in added])
        mine = [
            _Entry(iteration, data_time, dict(zip(names, row.tolist())))
            for (iteration, data_time, names, _), row in zip(added, values)
        ]
        everyone = comm.gather(mine)
        storage = get_event_storage()
        now = storage.iter
        try:
            for entry in mine:
                storage.iter = entry.iteration
                storage.put_scalar("rank_data_time", entry.data_time)
            for entries in zip(*everyone):  # everyone is empty but in the main process
                storage.iter = entries[0].iteration
                _put(storage, entries)
        finally:
            storage.iter = now


def _put(storage: EventStorage, entries: tuple[_Entry, ...]) -> None:
    """One iteration, of each process."""
    storage.put_scalar("data_time", max(entry.data_time for entry in entries))
    names = entries[0].losses
    means = {name: float(np.mean([entry.losses[name] for entry in entries])) for name in names}
    total = sum(means.values())
    if not np.isfinite(total):
        raise FloatingPointError(
            f"Loss became infinite or NaN at iteration={entries[0].iteration}!\nloss_dict = {means}"
        )
    storage.put_scalar("total_loss", total)
    if len(means) > 1:
        storage.put_scalars(**means)
