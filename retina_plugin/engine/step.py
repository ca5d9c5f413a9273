"""One training step: precision, accumulated gradients, the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_plugin.errors import ConfigError

from .loss_log import LossLog

__all__ = ["StepTrainer"]


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, also on the CPU, with accumulation.

    A batch B is split into P passes B_1 .. B_P of the same number of images, one after the other::

        g = (1 / P) sum over p of dL(B_p) / dw

    With L the mean over images of what depends on one image alone (``NORMALIZER per_image``, OHEM)
    g is the gradient of the whole batch; the memory is that of one pass. What a model computes from
    several images it computes from those of a pass: ``per_gpu`` and ``global`` divide by the
    positives of a pass, ``ema`` moves in each pass, batch norm normalises a pass. The images are
    those of the run without accumulation, in the same order: the loader gives the whole batch.
    The division is of the parameters' gradients, once, so that each pass is that of a whole batch.

    Losses are logged as the mean over passes. What the model itself writes to the event storage,
    scalars and pictures, it writes once a pass: a scalar's last value of an iteration is that of
    the last pass, and a picture is there P times.

    The losses of each iteration are logged, ``log_period`` iterations in one transfer from the
    device, and at ``max_iter`` what is left. With 1 a loss that is not finite never reaches the
    weights; otherwise it ends the training up to ``log_period - 1`` iterations later, and nothing
    waits in between. The error names the iteration where it was met first.

    Args:
        model: images and ground truth -> losses to be added up, or one loss.
        data_loader: gives the batches of this process.
        optimizer: of the model's parameters.
        passes: P.
        precision: ``torch.float16`` or ``torch.bfloat16`` for autocast; None: as the weights are.
        log_period: iterations from one transfer to the next.
        grad_scaler: for float16, see :func:`~retina_plugin.engine.precision.make_grad_scaler`; its
            state is in the checkpoint, as that of ``AMPTrainer``.
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
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.passes = passes
        self.precision = precision
        self.log_period = log_period
        self.grad_scaler = grad_scaler
        self.max_iter = 0  # not known before train(); the trainer around this one sets it too
        self._log = LossLog()
        self._device_type = next(model.parameters()).device.type

    def run_step(self) -> None:
        """Forward and backward passes, the log, the optimizer's step.

        Raises:
            ConfigError: a batch that the passes cannot share.
            FloatingPointError: a loss is not finite.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        # before the forward pass: its activations take the place of the old gradients
        self.optimizer.zero_grad()
        parts = _split(data, self.passes)
        losses = self._pass(parts[0], last=len(parts) == 1)
        for i, part in enumerate(parts[1:], start=2):
            for name, loss in self._pass(part, last=i == len(parts)).items():
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

    def after_backward(self) -> None:
        """Call the hooks, once all gradients are there. Detectron2 v0.6 has no such method."""
        for hook in self._hooks:
            hook.after_backward()

    def _pass(self, data: Any, last: bool) -> dict[str, Tensor]:
        """Add the gradients of one pass up; its losses."""
        sync: Any = contextlib.nullcontext()
        if not last and isinstance(self.model, DistributedDataParallel):
            sync = self.model.no_sync()  # the processes exchange gradients once a step
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
        """Detectron2's state, with the loss scaler's if there is one."""
        state = super().state_dict()
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; one of another precision has no scaler: it starts anew."""
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _split(data: Any, passes: int) -> list[Any]:
    if passes == 1:
        return [data]
    if len(data) % passes:
        raise ConfigError(
            f"SOLVER.ACCUMULATE {passes}: the data loader gave {len(data)} images, which cannot be "
            "split evenly; make it give a multiple"
        )
    size = len(data) // passes
    return [data[i : i + size] for i in range(0, len(data), size)]
