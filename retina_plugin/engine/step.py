"""One training step: precision, accumulated gradients, and the log of its losses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_plugin.errors import ConfigError
from retina_plugin.modeling.monitoring import MeanOverPasses

__all__ = ["LossLog", "StepTrainer"]


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with autocast on any device and gradient accumulation.

    ``AMPTrainer`` needs CUDA; neither of Detectron2's trainers accumulates gradients, and both
    synchronise with the GPU in every iteration to log the losses.

    A batch B is split into P passes B_1 .. B_P with the same number of images, and the step uses::

        g = (1 / P) sum over p of dL(B_p) / dw

    Activations are kept for one pass at a time. If L is a mean over images (``NORMALIZER
    per_image``, OHEM), g is the gradient of the whole batch. What a model computes over several
    images, it computes over those of a pass: ``NORMALIZER per_gpu`` and ``global`` count the
    positives of a pass, ``ema`` is updated once a pass, and batch norm normalises a pass. The data
    loader gives whole batches, so the images and their order do not depend on P. The gradients are
    divided by P once, after the last pass, so the backward pass of each part is that of a whole
    batch.

    The logged losses are means over the passes, and so are the scalars that the model itself puts
    into the event storage. A picture is there P times.

    The losses of ``log_period`` iterations are copied from the device together, and the rest of
    them at ``max_iter``. With ``log_period`` 1, a loss that is not finite stops the training before
    it reaches the weights. Otherwise it stops the training up to ``log_period - 1`` iterations
    later, and the error names the first such iteration.

    Args:
        model: images and ground truth -> a dict of losses, or one loss.
        data_loader: gives the batches of this process.
        optimizer: of the model's parameters.
        passes: P.
        precision: ``torch.float16`` or ``torch.bfloat16`` for autocast. None: no autocast.
        log_period: iterations whose losses are copied from the device together.
        grad_scaler: scales the loss, for float16. Its state is in the checkpoint, as
            ``AMPTrainer``'s is.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        precision: torch.dtype | None = None,
        log_period: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.passes = passes
        self.precision = precision
        self.log_period = log_period
        self.grad_scaler = grad_scaler
        self.max_iter = 0  # set by train(), or by the trainer that calls run_step()
        self._log = LossLog()
        self._device_type = next(model.parameters()).device.type

    def run_step(self) -> None:
        """Forward and backward passes, the log, the optimizer's step.

        Raises:
            ConfigError: the batch cannot be split evenly into the passes.
            FloatingPointError: a loss is not finite.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        # Before the forward pass, so that its activations can use the memory of the old gradients.
        self.optimizer.zero_grad()
        parts = _split(data, self.passes)
        with MeanOverPasses(get_event_storage()):
            losses = self._run_pass(parts[0], last=len(parts) == 1)
            for i, part in enumerate(parts[1:], start=2):
                for name, loss in self._run_pass(part, last=i == len(parts)).items():
                    losses[name] = losses[name] + loss
        if self.passes > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.passes)
        self.after_backward()
        self._log.add(self.iter, {k: v / self.passes for k, v in losses.items()}, data_time)
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self._log.write()
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _run_pass(self, data: list[dict[str, Any]], last: bool) -> dict[str, Tensor]:
        """Add the gradients of one pass to the parameters, and return its losses."""
        sync: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if not last and isinstance(self.model, DistributedDataParallel):
            sync = self.model.no_sync()  # the processes exchange gradients in the last pass only
        with sync:
            enabled = self.precision is not None
            with torch.autocast(self._device_type, self.precision, enabled=enabled):
                losses = self.model(data)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                total = sum(losses.values())
            if self.grad_scaler is not None:
                total = self.grad_scaler.scale(total)
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state, and the loss scaler's if there is one."""
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. The scaler starts anew if the state has none."""
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _split(data: list[dict[str, Any]], passes: int) -> list[list[dict[str, Any]]]:
    if passes == 1:
        return [data]
    if len(data) % passes:
        raise ConfigError(
            f"SOLVER.ACCUMULATE {passes}: the data loader gave {len(data)} images, which cannot be "
            "split evenly; make it give a multiple"
        )
    size = len(data) // passes
    return [data[i : i + size] for i in range(0, len(data), size)]


class _Entry(NamedTuple):
    """What is logged for one iteration of one process."""

    iteration: int
    data_time: float  # seconds
    losses: dict[str, float]


class LossLog:
    """Logs what ``SimpleTrainer.write_metrics`` logs, but for several iterations at once.

    ``add`` does not synchronise with the GPU. ``write`` does so once, and exchanges the numbers of
    all processes once.
    """

    def __init__(self) -> None:
        self._added: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def add(self, iteration: int, losses: Mapping[str, Tensor], data_time: float) -> None:
        """Keep the scalar losses of an iteration, and the seconds that it waited for data."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._added.append((iteration, data_time, tuple(losses), values))

    def write(self) -> None:
        """Put the added numbers into the event storage, each under its iteration.

        A loss is the mean over the processes, ``data_time`` the longest of theirs. All processes
        must call it, having added the same iterations.

        Raises:
            FloatingPointError: in the main process, if a loss is not finite. It names the first
                such iteration; those before it are in the storage.
        """
        added, self._added = self._added, []
        if not added:
            return
        values = torch.cat([x[-1] for x in added]).cpu().split([len(x[-1]) for x in added])
        of_this_process = [
            _Entry(iteration, data_time, dict(zip(names, row.tolist())))
            for (iteration, data_time, names, _), row in zip(added, values)
        ]
        of_processes = comm.gather(of_this_process)  # empty except in the main process
        storage = get_event_storage()
        current = storage.iter
        try:
            for entry in of_this_process:
                storage.iter = entry.iteration
                storage.put_scalar("rank_data_time", entry.data_time)
            for entries in zip(*of_processes):
                storage.iter = entries[0].iteration
                _put(storage, entries)
        finally:
            storage.iter = current


def _put(storage: EventStorage, entries: tuple[_Entry, ...]) -> None:
    """Log one iteration; ``entries`` has one entry for each process."""
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
