"""A training that can be interrupted at any moment and goes on as if nothing had happened."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from retina_plugin.data.loader import ResumableLoader
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint

from . import output
from .checkpoint import Checkpoints
from .differences import check_resumable, keep_hyperparameters, log_differences
from .signals import EXIT_CODE, Interrupted, StopRequests
from .state import load_random_state, load_storage_state, restore_process
from .writers import Writers, trim_metrics

__all__ = ["ResumableTrainer"]

logger = logging.getLogger("retina_plugin")


class ResumableTrainer(DefaultTrainer):
    """``DefaultTrainer`` that resumes exactly, obeys signals and keeps its folder to itself.

    A subclass builds the parts, one of them the :class:`.checkpoint.Checkpoints`.
    """

    cfg: CfgNode
    iter: int
    checkpointer: Checkpointer
    _checkpoints: Checkpoints

    def __init__(self) -> None:
        # Not DefaultTrainer's __init__, which builds everything.
        super(DefaultTrainer, self).__init__()
        self._resumes = False
        self._saved_state: dict[str, Any] = {}  # "resume" of the checkpoint
        self._requests = StopRequests()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint, except for what the config says of the optimizer."""
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        keep_hyperparameters(self.optimizer, self.scheduler, own)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of ``OUTPUT_DIR``, or the weights of ``MODEL.WEIGHTS``.

        Args:
            resume: continue the training of ``OUTPUT_DIR``, exactly as if it had not been
                interrupted. False, or without a checkpoint there: start with the weights.

        Raises:
            ConfigError: the checkpoint is of another model or has other groups of parameters in
                the optimizer; the weights cannot be read.
        """
        # A training that began here and was killed before its first checkpoint: the checkpoints
        # are those of an earlier training.
        begun_anew = comm.all_gather(output.begun_anew(self.cfg.OUTPUT_DIR))[0]
        self._resumes = resume and not begun_anew
        path = ""
        if self._resumes:
            path = self.checkpointer.get_checkpoint_file() if comm.is_main_process() else ""
            path = comm.all_gather(path)[0]
        if not path:
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)
            return
        self.resume_from(path)

    def resume_from(self, path: str) -> None:
        """Continue from a checkpoint of ``OUTPUT_DIR``. Raises as :meth:`resume_or_load`."""
        if not all(comm.all_gather(os.path.isfile(path))):
            raise ConfigError(
                f"--resume: not every process can read {path}: put OUTPUT_DIR on a disk that all "
                "machines share"
            )
        checkpoint = read_checkpoint(path)
        check_resumable(path, checkpoint, self.cfg, self.checkpointer.model, self.optimizer)
        if comm.is_main_process():
            log_differences(path, checkpoint, self.cfg)
        self._saved_state = checkpoint.get("resume", {})
        del checkpoint  # it is read again, and is large
        self.checkpointer.load(path)
        self.start_iter = self.iter + 1
        self._checkpoints.saved = os.path.basename(path)
        if self._saved_state:
            restore_process(
                self._saved_state["processes"], self.checkpointer.model, self._checkpoints.loaders
            )
        if not isinstance(self.data_loader, ResumableLoader):
            logger.warning(
                "The training data has no position to return to (it is an IterableDataset, or "
                "build_train_loader is your own): it begins anew"
            )

    def train(self) -> Any:
        """Train from ``start_iter`` to ``max_iter``, and evaluate.

        SIGTERM, SIGINT and SIGUSR1 stop it after the iteration, with a checkpoint.

        Returns:
            The metrics, if ``TEST.EXPECTED_RESULTS`` is set.

        Raises:
            Interrupted: a signal came; a SystemExit with code 75.
            ConfigError: ``OUTPUT_DIR`` cannot be written to or is in use; ``model_final.pth``
                cannot be written.
        """
        folder = self.cfg.OUTPUT_DIR
        output.run_on_main_process(self._prepare_folder)
        if self.start_iter >= self.max_iter:
            logger.warning(
                "Nothing is left to train: %d iterations are done, and SOLVER.MAX_ITER is %d",
                *(self.start_iter, self.max_iter),
            )
        try:
            with StopRequests() as self._requests:
                return super().train()
        finally:
            output.release(folder)

    def _prepare_folder(self) -> None:
        folder = self.cfg.OUTPUT_DIR
        output.claim(folder)
        output.begin(folder, resumed=self._resumes)
        try:
            trim_metrics(Path(folder) / "metrics.json", self._last_written("JSONWriter"))
        except OSError as error:
            logger.warning("cannot write %s/metrics.json: %s", folder, error.strerror or error)

    def _last_written(self, writer: str) -> int:
        """The last iteration that a writer had written when the checkpoint was saved."""
        return self._saved_state.get("writers", {}).get(writer, self.start_iter - 1)

    def last_written(self) -> dict[str, int]:
        """Name of a writer -> the last iteration that it wrote."""
        return next((h.last_written() for h in self._hooks if isinstance(h, Writers)), {})

    def before_train(self) -> None:
        """Hooks, then the rest of the checkpoint: nothing that comes later changes it."""
        super().before_train()
        saved = self._saved_state
        if not saved:
            return
        if comm.is_main_process():
            load_storage_state(self.storage, saved["storage"])
        for hook in self._hooks:
            if isinstance(hook, Writers):
                hook.set_last_written(saved["writers"])
        if len(saved["processes"]) == comm.get_world_size():
            load_random_state(saved["processes"][comm.get_rank()]["random"])
        in_use = self._checkpoints in self._hooks
        if saved["pending"] and in_use and self.start_iter < self.max_iter:
            self._finish_iteration()

    def _finish_iteration(self) -> None:
        """Run the hooks that the interrupted training had not run after the checkpoint."""
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks[self._hooks.index(self._checkpoints) + 1 :]:
            hook.after_step()
        self._end_iteration()

    def after_step(self) -> None:
        """Hooks, then the checkpoint, then the answer to a signal."""
        super().after_step()
        self._end_iteration()

    def _end_iteration(self) -> None:
        self._checkpoints.end_iteration()
        if self._requests.agreed():
            self._say_interrupted(self._checkpoints.save_interrupted())
            comm.synchronize()  # a launcher ends all processes when the first one ends
            raise Interrupted

    def _say_interrupted(self, saved: str) -> None:
        """Say what a signal did.

        Args:
            saved: the checkpoint's name; "" if it could not be written.

        Raises:
            ConfigError: it could not.
        """
        if not comm.is_main_process():
            return
        name = "A signal" if self._requests.received is None else self._requests.received.name
        done = self.iter + 1
        if not saved:
            raise ConfigError(
                f"{name} stopped the training after iteration {done}, and it could not be saved: "
                "make room, then --resume goes on from the last checkpoint"
            )
        path = os.path.join(self.cfg.OUTPUT_DIR, saved)
        logger.warning(
            "%s stopped the training after iteration %d, saved in %s: --resume continues it "
            "(exit code %d)",
            *(name, min(done, self.max_iter), path, EXIT_CODE),
        )

    def after_train(self) -> None:
        """Hooks. Without an iteration left to train, ``iter`` is the number of those done."""
        if self.start_iter >= self.max_iter:
            self.iter = self.start_iter  # Detectron2 counts one more
        super().after_train()
