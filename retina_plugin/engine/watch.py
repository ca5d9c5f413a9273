"""Remembers the last steps until their flags are read, and says what is not finite in them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .diagnosis import Diagnosis, file_names, first_of
from .finite import NonFiniteError, nonfinite_names
from .inspection import diagnose
from .state import load_random_state, random_state
from .step_record import ProcessFacts, StepRecord

if TYPE_CHECKING:
    from .step import StepTrainer

__all__ = ["StepWatch", "Stop"]

logger = logging.getLogger("retina_plugin")


class _Step(NamedTuple):
    iteration: int
    losses: dict[str, Tensor]
    flag: Tensor  # 1 if it is not finite
    images: list[dict[str, Any]]
    samples: list[list[int]]
    random_states: dict[str, Any]


class Stop(NamedTuple):
    """The step that ends a training, and the error to raise."""

    iteration: int
    error: NonFiniteError


class StepWatch:
    """Remembers the last steps until their flags are read, and says what is not finite in them.

    Nothing here synchronises, except ``read`` and ``check_weights``.

    Args:
        trainer: whose steps these are.
        max_skipped: steps that may be skipped in the whole training.
    """

    def __init__(self, trainer: StepTrainer, max_skipped: int) -> None:
        self.skipped = 0  # in the whole training, up to the last read
        self.max_skipped = max_skipped
        self._trainer = trainer
        self._begun: tuple[list[dict[str, Any]], list[list[int]], dict[str, Any]] | None = None
        self._steps: list[_Step] = []
        self._last: _Step | None = None
        self._masks: set[str] | None = None

    def begin(self, data: list[Any]) -> None:
        """Before the forward pass."""
        if self._masks is None:
            self._masks = _infinite_buffers(self._model)
        samples = getattr(self._trainer.data_loader, "last_samples", [])
        self._begun = (_images(data), [list(x) for x in samples], random_state())

    def end(self, losses: dict[str, Tensor], flag: Tensor) -> None:
        """After the optimizer's step; ``flag`` is that of ``StepGate.step``."""
        assert self._begun is not None, "begin() comes first"
        self._steps.append(_Step(self._trainer.iter, losses, flag, *self._begun))

    def read(self, data: list[Any] | None = None) -> Stop | None:
        """Read the flags, and warn of the steps that were skipped. All processes must call it.

        Args:
            data: the batch of the last step, while its gradients are still there.

        Returns:
            The step at which the training has to stop, if there is one.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return None
        self._last = steps[-1]
        flags = torch.stack([step.flag for step in steps]).tolist()
        for step, flag in zip(steps, flags):
            if not flag:
                continue
            stops = self.skipped == self.max_skipped
            # The model is still what it was in this step, if no later step has changed it.
            same_model = stops or step is steps[-1]
            record, path = self._record(step, data if step is steps[-1] else None, same_model)
            if stops:
                return Stop(step.iteration, self._error(record, path))
            self.skipped += 1
            logger.warning(
                "skipped a step (%d of SOLVER.MAX_SKIPPED_STEPS %d): %s%s",
                *(self.skipped, self.max_skipped, record.describe(), path and f" ({path})"),
            )
        return None

    def check_weights(self) -> None:
        """See ``StepTrainer.check_finite``."""
        names = nonfinite_names(self._state())
        if not any(comm.all_gather(names)):
            return
        step = self._last
        facts = ProcessFacts({}) if step is None else self._facts(step)
        if names:
            facts.cause = f"the weights after the step ({first_of(names)})"
        iteration = self._trainer.iter if step is None else step.iteration
        record = StepRecord(iteration, comm.all_gather(facts), self.skipped)
        raise self._error(record, self._write(record))

    @property
    def _model(self) -> nn.Module:
        model: nn.Module = self._trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _state(self) -> list[tuple[str, Tensor]]:
        """The tensors of a checkpoint, by name."""
        parameters = dict(self._model.named_parameters())
        buffers = [(k, x) for k, x in self._model.named_buffers() if k not in (self._masks or ())]
        names = {id(p): name for name, p in parameters.items()}
        optimizer = [
            (f"{key} of {names.get(id(p), 'a parameter')}", x)
            for p, state in self._trainer.optimizer.state.items()
            for key, x in state.items()
            if isinstance(x, Tensor)
        ]
        return [*parameters.items(), *buffers, *optimizer]

    def _facts(self, step: _Step) -> ProcessFacts:
        loader = self._trainer.data_loader
        return ProcessFacts(
            losses={name: loss.item() for name, loss in step.losses.items()},
            images=step.images,
            samples=step.samples,
            random_states=step.random_states,
            loader=loader.state_dict() if hasattr(loader, "last_samples") else {},
            bad_images=file_names(step.images),
        )

    def _record(
        self, step: _Step, data: list[Any] | None, same_model: bool
    ) -> tuple[StepRecord, str]:
        facts = self._facts(step)
        if data is not None:
            gradients = [
                (name, p.grad) for name, p in self._model.named_parameters() if p.grad is not None
            ]
            if names := nonfinite_names(gradients):
                facts.cause = f"the gradient of {first_of(names)}"
        if data is None and same_model and step.samples:
            data = self._trainer.data_loader.read(step.samples)
        diagnosis = self._diagnose(step, data if same_model else None)
        if diagnosis is not None:
            facts.diagnosis = diagnosis.as_dict()
            if cause := diagnosis.cause():
                facts.cause, facts.bad_images = cause, diagnosis.bad_images()
        record = StepRecord(step.iteration, comm.all_gather(facts), self.skipped)
        return record, self._write(record)

    def _diagnose(self, step: _Step, data: list[Any] | None) -> Diagnosis | None:
        """Run the step again. None if that is not possible in every process."""
        sizes = comm.all_gather(0 if data is None else len(data))
        if data is None or not all(sizes):
            return None
        states = random_state()
        load_random_state(step.random_states)
        try:
            return diagnose(
                self._model,
                self._trainer.split(data),
                self._trainer.losses_of,
                iteration=step.iteration,
                images_alone=max(sizes),
            )
        except Exception:  # whatever a broken model does, the error to report is another one
            logger.warning("the step could not be run again", exc_info=True)
            return None
        finally:
            load_random_state(states)

    def _write(self, record: StepRecord) -> str:
        """Write the record in the main process; its path in all of them, "" if there is none."""
        path = ""
        write = self._trainer.write_record
        if comm.is_main_process() and write is not None:
            try:
                path = str(write(record))
            except OSError as error:
                logger.warning("cannot write what is needed to repeat the step: %s", error)
        return comm.all_gather(path)[0]

    def _error(self, record: StepRecord, path: str) -> NonFiniteError:
        text = record.describe()
        if self.max_skipped:
            text += (
                f"; skipped before: {self.skipped} (SOLVER.MAX_SKIPPED_STEPS {self.max_skipped})"
            )
        text += f": {record.fix()}"
        if path:
            text += f"; `retina replay {path}` repeats the step"
        return NonFiniteError(text)


def _images(data: list[Any]) -> list[dict[str, Any]]:
    return [
        {key: x.get(key) for key in ("file_name", "image_id")} if isinstance(x, Mapping) else {}
        for x in data
    ]


def _infinite_buffers(model: nn.Module) -> set[str]:
    """Buffers that hold infinity on purpose, such as the mask of an attention."""
    buffers = dict(model.named_buffers())
    return {name for name in nonfinite_names(buffers.items()) if not buffers[name].isnan().any()}
