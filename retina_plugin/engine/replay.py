"""Repeats a step that was not finite, from the last checkpoint before it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from retina_plugin.errors import ConfigError

from .checks import check_run
from .diagnosis import Diagnosis
from .finite import NonFiniteError
from .inspection import diagnose
from .setup import setup_cfg
from .state import load_random_state
from .step_record import StepRecord, from_json
from .trainer import Trainer

__all__ = ["Replay", "replay"]


@dataclass
class Replay:
    """A step that was run again.

    Args:
        record: of the step.
        start: the iteration that the run was rolled forward from.
        checkpoint: its file; "" if there was none before the step.
        stopped_at: the iteration that was not finite; None if the step is finite this time. It is
            before ``record.iteration`` if the run did not get there.
        error: what ``stopped_at`` ended with, in one line; "" without.
        diagnosis: of the step; None if the run did not get there.
    """

    record: StepRecord
    start: int
    checkpoint: str
    stopped_at: int | None = None
    error: str = ""
    diagnosis: Diagnosis | None = None

    @property
    def is_reproduced(self) -> bool:
        """The step is not finite again."""
        return self.stopped_at == self.record.iteration


def replay(path: str | os.PathLike[str], opts: list[str] | None = None) -> Replay:
    """Repeat the step of a file ``nonfinite_<iteration>.json``, in this process.

    It continues from the checkpoint that was the last one then, without saving or evaluating, up to
    the step. The checkpoint is looked for beside the file. A training of several processes is
    repeated by one, with the images of each process as a pass of ``SOLVER.ACCUMULATE``: equal up to
    rounding, and to what each process keeps for itself (the statistics of batch norm).

        result = replay("output/run/nonfinite_0000123.json", ["SOLVER.BASE_LR", "0.001"])
        result.is_reproduced, result.diagnosis.levels["p5"]

    Args:
        opts: overrides of the training's config, as [key, value, ...].

    Raises:
        ConfigError: the file cannot be read, its checkpoint is gone, or the training imported
            modules (``IMPORTS``) that ``opts`` do not name.
    """
    record = StepRecord.read(path)
    cfg = _config(record, Path(path), list(opts or []))
    check_run(cfg, None, resume=bool(record.last_checkpoint))
    cfg.freeze()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)  # as a training does, before it is built
    trainer = Trainer(cfg)
    step = trainer._trainer
    step.log_period = 1  # the flags are read in each step
    step.write_record = None
    checkpoint = _load(trainer, record)
    result = Replay(record, trainer.start_iter, checkpoint)
    with EventStorage(trainer.start_iter) as trainer.storage:
        for iteration in range(trainer.start_iter, record.iteration + 1):
            trainer.iter = trainer.storage.iter = iteration
            if iteration == record.iteration:
                batch = _batch(trainer, record)
                result.diagnosis = _diagnose(trainer, record, batch)
                step._data_loader_iter_obj = iter([batch])
                step.stop_at_next()
            try:
                trainer.run_step()
                step.check_finite()
            except NonFiniteError as error:
                result.stopped_at, result.error = iteration, str(error)
                return result
            trainer.scheduler.step()
    return result


def _config(record: StepRecord, path: Path, opts: list[str]) -> CfgNode:
    try:
        settings = yaml.safe_load(record.config)
        imports = tuple(settings["IMPORTS"] or ())
        passes = settings["SOLVER"]["ACCUMULATE"] * len(record.processes)
        settings["SOLVER"]["ACCUMULATE"] = passes
        settings["SOLVER"]["REFERENCE_WORLD_SIZE"] = 0  # the config is scaled already
        settings["IMPORTS"] = []  # a file must not make code run
        settings["OUTPUT_DIR"] = str(path.parent)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: its config cannot be read ({error})") from None
    if imports and "IMPORTS" not in opts[::2]:
        raise ConfigError(
            f"{path}: the training imported {', '.join(imports)}, and a file cannot make that run: "
            f'if you trust it, add IMPORTS "{list(imports)}" to the command'
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, f"{path.stem}.yaml")
        copy.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return setup_cfg(str(copy), opts)


def _load(trainer: Trainer, record: StepRecord) -> str:
    """Bring the trainer to the state of the last checkpoint, or to the begin of the training."""
    if not record.last_checkpoint:
        trainer.resume_or_load(resume=False)
        state = record.processes[0].loader
        if state and hasattr(trainer.data_loader, "load_state_dict"):
            one = {"position": 0, "waiting": [], "world_size": 1}
            trainer.data_loader.load_state_dict({**state, **one})
        return ""
    path = Path(trainer.cfg.OUTPUT_DIR, os.path.basename(record.last_checkpoint))
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}, from which the step can be repeated: put the checkpoint back"
        )
    trainer.resume_from(str(path))
    if trainer.start_iter > record.iteration:
        raise ConfigError(
            f"{path} is of iteration {trainer.start_iter - 1}, after the step: another training "
            "has written it"
        )
    saved: dict[str, Any] = trainer._saved_state
    if saved and len(saved["processes"]) == 1:
        load_random_state(saved["processes"][0]["random"])
    return str(path)


def _batch(trainer: Trainer, record: StepRecord) -> list[Any]:
    """The images of the step, of all processes."""
    samples = [tuple(sample) for process in record.processes for sample in process.samples]
    if samples and hasattr(trainer.data_loader, "read"):
        return trainer.data_loader.read(samples)
    return next(trainer._trainer._data_loader_iter)


def _diagnose(trainer: Trainer, record: StepRecord, batch: list[Any]) -> Diagnosis:
    step = trainer._trainer
    if len(record.processes) == 1 and record.processes[0].random_states:
        load_random_state(from_json(record.processes[0].random_states))
    return diagnose(
        trainer.model,
        step.split(batch),
        step.losses_of,
        iteration=record.iteration,
        images_alone=len(batch),
    )
