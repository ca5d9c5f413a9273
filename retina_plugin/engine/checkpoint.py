"""Hooks that save: the checkpoints to resume from, and the best one."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint

from .state import gather_processes, storage_state

__all__ = ["BestCheckpoint", "Checkpoints"]

logger = logging.getLogger("retina_plugin")


class Checkpoints(HookBase):
    """Saves all that the next iteration depends on: ``model_0000999.pth``, ``model_final.pth``.

    Files have Detectron2's names, and what Detectron2 has in them. "resume" is added:

    - ``processes``: the state of each process (see :func:`.state.gather_processes`);
    - ``storage``, ``writers``: recent values of the log, and what was written last;
    - ``parameters``: the names of the parameters in the optimizer's groups;
    - ``config``: the config, as YAML;
    - ``pending``: whether hooks of that iteration are still to run (see below).

    An iteration ends with evaluation, best checkpoint and log lines, and it is saved after them. If
    an evaluation is due, it is saved before too: an evaluation can fail. Such a checkpoint is
    "pending", and a resumed training first runs the hooks that follow this one.

    All processes need this hook. The main process saves.

    Args:
        checkpointer: writes the files.
        period: iterations from one checkpoint to the next (``SOLVER.CHECKPOINT_PERIOD``).
        eval_period: ``TEST.EVAL_PERIOD``.
        config: as YAML.
        loaders: data loaders whose positions are saved.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        eval_period: int,
        *,
        config: str,
        loaders: list[Any],
    ) -> None:
        self.loaders = loaders
        self._checkpointer = checkpointer
        self._period, self._eval_period = period, eval_period
        self._config = config
        self._saved = ""  # the file of this iteration
        self._before_evaluation: dict[str, Any] = {}

    def before_step(self) -> None:
        self._saved = ""

    def after_step(self) -> None:
        """Save before the evaluation, and keep what it may change."""
        done = self.trainer.iter + 1
        if self._eval_period > 0 and done % self._eval_period == 0 and not self._is_last():
            self._check_finite()
            self._before_evaluation = self._state(pending=True)
            if self._is_due():
                self._save(self._name(), self._before_evaluation)

    def end_iteration(self) -> None:
        """Save after all hooks. All processes call it.

        Raises:
            ConfigError: ``model_final.pth`` cannot be written.
        """
        if not self._is_due() and not self._is_last():
            return
        self._check_finite()
        state = self._state(pending=False)
        if self._is_due():
            self._save(self._name(), state)
        if self._is_last():
            self._save("model_final", state)
            if comm.all_gather(self._saved)[0] != "model_final.pth":
                raise ConfigError(
                    f"model_final.pth could not be written to {self._checkpointer.save_dir}: "
                    "make room, then --resume goes on from the last checkpoint"
                )

    def save_interrupted(self) -> str:
        """Save at the end of an iteration, if that was not done. All processes call it.

        Returns:
            The name of the file, in the main process; "" if it could not be written.
        """
        if not comm.all_gather(self._saved)[0]:
            self._check_finite()
            self._save(self._name(), self._state(pending=False))
        return self._saved

    def save_before_evaluation(self) -> str:
        """Save, in the main process alone, what was before the evaluation that is cut off.

        Returns:
            As :meth:`save_interrupted`.
        """
        if not self._saved:
            self._save(self._name(), self._before_evaluation)
        return self._saved

    def _name(self) -> str:
        return f"model_{self.trainer.iter:07d}"

    def _is_due(self) -> bool:
        return self._period > 0 and (self.trainer.iter + 1) % self._period == 0

    def _is_last(self) -> bool:
        return self.trainer.iter >= self.trainer.max_iter - 1

    def _check_finite(self) -> None:
        """No checkpoint gets a number that is not finite."""
        check = getattr(self.trainer._trainer, "check_finite", None)
        if check is not None:  # a subclass may have another step
            check()

    def _state(self, pending: bool) -> dict[str, Any]:
        """What "resume" is in a checkpoint of this moment; {} except in the main process."""
        model: nn.Module = self._checkpointer.model
        processes = gather_processes(model, self.loaders)
        if not processes:
            return {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = self.trainer.optimizer.param_groups
        return {
            "pending": pending,
            "processes": processes,
            "storage": storage_state(self.trainer.storage),
            "writers": self.trainer.last_written(),
            "parameters": [[names.get(p, "?") for p in group["params"]] for group in groups],
            "config": self._config,
        }

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if not state:
            return
        try:
            self._checkpointer.save(name, iteration=self.trainer.iter, resume=state)
        except OSError as error:
            logger.error("%s. Older checkpoints stay, and the training goes on", error)
        else:
            self._saved = f"{name}.pth"


class BestCheckpoint(HookBase):
    """Keeps the checkpoint of the best AP: ``model_best.pth``, and its AP in ``model_best.json``.

    The AP is in the checkpoint too, and after a resume the JSON is made from it. So a record never
    stands without its weights, whenever the process was killed.

    Args:
        checkpointer: writes the files.
        eval_period: ``TEST.EVAL_PERIOD``.
        metric: its name in the event storage, e.g. "bbox/AP".
        dataset: that it is measured on. A resumed training with another one looks for its own best.
    """

    def __init__(
        self, checkpointer: Checkpointer, eval_period: int, metric: str, dataset: str
    ) -> None:
        self._checkpointer = checkpointer
        self._eval_period = eval_period
        self._metric, self._dataset = metric, dataset
        folder = Path(checkpointer.save_dir)
        self._weights, self._record = folder / "model_best.pth", folder / "model_best.json"
        self._best: float | None = None

    def before_train(self) -> None:
        self._best = None
        if self.trainer.start_iter > 0:
            try:
                self._best = self._read_best()
            except OSError as error:
                logger.warning("cannot write %s: %s", self._record, error.strerror or error)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        evaluated = self._eval_period > 0 and done % self._eval_period == 0
        if evaluated and done != self.trainer.max_iter:  # there it follows the training
            self._keep_best()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._keep_best()

    def _keep_best(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        if not math.isfinite(value) or iteration != self.trainer.storage.iter:
            return  # no box counts for it, or the evaluation failed
        if self._best is not None and value <= self._best:
            return
        best = {"metric": self._metric, "dataset": self._dataset, "value": value}
        try:
            self._checkpointer.save("model_best", tag=False, iteration=iteration, best=best)
            self._best = value
            self._write_record(value, iteration)
        except OSError as error:
            logger.error("%s. The older model_best.pth stays, and the training goes on", error)

    def _write_record(self, value: float, iteration: int) -> None:
        with atomic_write(self._record) as temporary:
            temporary.write_text(json.dumps({self._metric: value, "iteration": iteration}))

    def _read_best(self) -> float | None:
        """The AP of ``model_best.pth``, or None; the JSON is put right."""
        if not self._weights.exists():
            if self._record.exists():
                logger.warning("%s is deleted: it has no model_best.pth", self._record)
                self._record.unlink()
            return None
        try:
            saved = read_checkpoint(self._weights)
        except ConfigError as error:
            logger.warning("%s. The next evaluation counts as the best", error)
            self._record.unlink(missing_ok=True)
            return None
        iteration, record = saved.get("iteration", -1), self._read_record()
        best = saved.get("best")
        if best is None and record.get("iteration") == iteration and self._metric in record:
            # An older version's, which had the AP in the JSON alone.
            best = {"metric": self._metric, "dataset": self._dataset}
            best["value"] = record[self._metric]
        if best is None or (best["metric"], best["dataset"]) != (self._metric, self._dataset):
            logger.warning(
                "%s is not the best on %s: the next evaluation counts as the best",
                *(self._weights, self._dataset),
            )
            return None
        if record != {self._metric: best["value"], "iteration": iteration}:
            logger.warning("%s is written again, from model_best.pth", self._record)
            self._write_record(best["value"], iteration)
        return best["value"]

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


def best_checkpoint(cfg: CfgNode, checkpointer: Checkpointer) -> BestCheckpoint:
    """The hook for the AP of boxes on the first test set of ``cfg``."""
    name = cfg.DATASETS.TEST[0]
    # With several test sets, Detectron2 puts the name of the set before the metric.
    prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
    return BestCheckpoint(checkpointer, cfg.TEST.EVAL_PERIOD, f"{prefix}bbox/AP", name)
