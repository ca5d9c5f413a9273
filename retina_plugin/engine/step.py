"""One training step: precision, accumulated gradients, and the log of its losses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
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

from .finite import StepGate
from .step_record import StepRecord
from .watch import StepWatch

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
    them at ``max_iter``.

    A step whose total loss or gradient is not finite, in any process, does not change the model
    (:class:`~retina_plugin.engine.finite.StepGate`). Up to ``max_skipped_steps`` of them are
    skipped, each with a warning; the next one stops the training. The host reads that when it
    writes the log, in ``check_finite`` and at ``max_iter``. So the stop can come ``log_period - 1``
    iterations later, but the model is still the one before that step. Losses that are not finite
    are not logged.

    Args:
        model: images and ground truth -> a dict of losses, or one loss.
        data_loader: gives the batches of this process.
        optimizer: of the model's parameters.
        passes: P.
        precision: ``torch.float16`` or ``torch.bfloat16`` for autocast. None: no autocast.
        log_period: iterations whose losses are copied from the device together.
        grad_scaler: scales the loss, for float16. Its state is in the checkpoint, as
            ``AMPTrainer``'s is.
        max_skipped_steps: steps that are not finite and may be skipped in the whole training.
        write_record: called in the main process with what is known of a step that is not finite;
            returns the file that it wrote. None: nothing is written.

    Raises:
        ConfigError: ``max_skipped_steps`` is negative.
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
        max_skipped_steps: int = 0,
        write_record: Callable[[StepRecord], Path] | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.passes = passes
        self.precision = precision
        self.log_period = log_period
        self.grad_scaler = grad_scaler
        self.max_iter = 0  # set by train(), or by the trainer that calls run_step()
        self._log = LossLog()
        self._device_type = next(model.parameters()).device.type
        self._gate = StepGate(model, optimizer, max_skipped_steps)
        self._watch = StepWatch(self, max_skipped_steps)
        self.write_record = write_record

    def run_step(self) -> None:
        """Forward and backward passes, the log, the optimizer's step.

        Raises:
            ConfigError: the batch cannot be split evenly into the passes.
            NonFiniteError: a loss or a gradient is not finite (a FloatingPointError), in all
                processes.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        # Before the forward pass, so that its activations can use the memory of the old gradients.
        self.optimizer.zero_grad()
        self._watch.begin(data)
        self._gate.before_forward()
        parts = self.split(data)
        with MeanOverPasses(get_event_storage()):
            losses = self._run_pass(parts[0], last=len(parts) == 1)
            for i, part in enumerate(parts[1:], start=2):
                for name, loss in self._run_pass(part, last=i == len(parts)).items():
                    losses[name] = losses[name] + loss
        if self.passes > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.passes)
        self.after_backward()
        losses = {k: v / self.passes for k, v in losses.items()}
        total = self._log.add(self.iter, losses, data_time)
        self._watch.end(losses, self._gate.step(total, self.grad_scaler))
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter:
            self._read(data)

    def _read(self, data: list[Any] | None = None) -> None:
        """Read the flags of the steps since the last time, and log their losses."""
        stopped = self._watch.read(data)
        if stopped is not None:
            self._log.drop_from(stopped.iteration)
        self._log.write()
        if stopped is not None:
            raise stopped.error

    def check_finite(self) -> None:
        """Raise if the model must not be saved. All processes must call it, before each save.

        Synchronises once.

        Raises:
            NonFiniteError: a step since the last log was not finite and may not be skipped, or a
                weight, a buffer or a number of the optimizer is not finite.
        """
        self._read()
        self._watch.check_weights()

    def stop_at_next(self) -> None:
        """From now on, skip no more steps: stop at the next one that is not finite."""
        self._gate.max_skipped = self._watch.max_skipped = self._watch.skipped

    def losses_of(self, model: nn.Module, data: Sequence[Any]) -> dict[str, Tensor]:
        """The losses of a model in the precision of this trainer."""
        with torch.autocast(self._device_type, self.precision, enabled=self.precision is not None):
            losses = model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def split(self, data: list[Any]) -> list[list[Any]]:
        """The passes of a batch.

        Raises:
            ConfigError: it cannot be split evenly.
        """
        if self.passes == 1:
            return [data]
        if len(data) % self.passes:
            raise ConfigError(
                f"SOLVER.ACCUMULATE {self.passes}: the data loader gave {len(data)} images, which "
                "cannot be split evenly; make it give a multiple"
            )
        size = len(data) // self.passes
        return [data[i : i + size] for i in range(0, len(data), size)]

    def _run_pass(self, data: list[dict[str, Any]], last: bool) -> dict[str, Tensor]:
        """Add the gradients of one pass to the parameters, and return its losses."""
        sync: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if not last and isinstance(self.model, DistributedDataParallel):
            sync = self.model.no_sync()  # the processes exchange gradients in the last pass only
        with sync:
            losses = self.losses_of(self.model, data)
            total: Any = sum(losses.values())
            if self.grad_scaler is not None:
                total = self.grad_scaler.scale(total)
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state, and where there are any the loss scaler's and the skipped steps."""
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if self._watch.skipped:
            state["skipped_steps"] = self._watch.skipped
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. The scaler starts anew if the state has none."""
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._watch.skipped = state_dict.get("skipped_steps", 0)
        self._gate.set_count(self._watch.skipped)


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

    def add(self, iteration: int, losses: Mapping[str, Tensor], data_time: float) -> Tensor:
        """Keep the scalar losses of an iteration, and the seconds that it waited for data.

        Returns:
            The sum of the losses.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._added.append((iteration, data_time, tuple(losses), values))
        return values.sum()

    def drop_from(self, iteration: int) -> None:
        """Forget this iteration and those after it."""
        self._added = [x for x in self._added if x[0] < iteration]

    def write(self) -> None:
        """Put the added numbers into the event storage, each under its iteration.

        A loss is the mean over the processes, ``data_time`` the longest of theirs. Where the total
        is not finite, the losses of the iteration are left out. All processes must call it, having
        added the same iterations.
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
        return  # a skipped step; a mean with a NaN in it would hide the others of its window
    storage.put_scalar("total_loss", total)
    if len(means) > 1:
        storage.put_scalars(**means)
