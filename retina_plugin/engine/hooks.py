"""What the trainer does besides Detectron2's hooks."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from detectron2.engine import HookBase, hooks
from tqdm import tqdm  # Detectron2 needs it too

from . import report

__all__ = ["BestCheckpoint", "Pictures", "ProgressBar"]


class BestCheckpoint(hooks.BestCheckpointer):
    """Detectron2's hook that keeps ``model_best.pth``, but a resumed run knows the best so far.

    Args: see Detectron2's; the best value so far is kept beside the checkpoint, in
        ``model_best.json``.
    """

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self._record.is_file():
            best = json.loads(self._record.read_text())
            if self._val_metric in best:  # else DATASETS.TEST is another one than before
                self.best_metric, self.best_iter = best[self._val_metric], best["iteration"]

    def after_train(self) -> None:
        # Saving makes a file the one that a resumed run loads. That must stay the last regular
        # checkpoint: one of now would count an iteration more than was trained.
        last = self._checkpointer.get_checkpoint_file()
        super().after_train()
        if last:
            self._checkpointer.tag_last_checkpoint(Path(last).name)

    def _update_best(self, val: float, iteration: int) -> bool:
        updated = super()._update_best(val, iteration)
        if updated:
            self._record.write_text(json.dumps({self._val_metric: val, "iteration": iteration}))
        return updated

    @property
    def _record(self) -> Path:
        return Path(self._checkpointer.save_dir) / f"{self._file_prefix}.json"


class ProgressBar(HookBase):
    """A bar with loss, ETA and memory on a terminal; nothing where the output is no terminal.

    While it shows, Detectron2's progress lines go to the log file only and other log lines appear
    above the bar.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._bar: tqdm | None = None
        self._undo = contextlib.ExitStack()

    def before_train(self) -> None:
        if not self._stream.isatty():
            return
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc="train",
            unit="it",
            dynamic_ncols=True,
            file=self._stream,
        )
        for name in ("detectron2", "fvcore", "retina_plugin"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                    handler.addFilter(_not_progress)
                    handler.setStream(_AboveBar(self._stream))
                    self._undo.callback(handler.setStream, sys.stdout)
                    self._undo.callback(handler.removeFilter, _not_progress)

    def after_step(self) -> None:
        if self._bar is None:
            return
        postfix = {"mem": f"{_memory_gib():.1f}G"}
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            postfix["loss"] = f"{latest['total_loss'][0]:.3f}"
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._undo.close()


class _AboveBar:
    """A stream that prints above a tqdm bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


def _not_progress(record: logging.LogRecord) -> bool:
    return record.name != "detectron2.utils.events"


def _memory_gib() -> float:
    """Peak memory: the GPU's where one is used, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Pictures(HookBase):
    """At the end: ``training_curves.png`` and ``detections.png`` in the output folder.

    Args:
        cfg: names the output folder and the validation set.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # training failed: leave the exception to be seen
        out = Path(self._cfg.OUTPUT_DIR)
        report.draw_training_curves(out / "metrics.json", out / "training_curves.png")
        report.draw_detections(self._cfg, self.trainer.model, out / "detections.png")
