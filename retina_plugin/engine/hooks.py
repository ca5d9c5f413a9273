"""Hooks of the trainer: evaluation, progress, results."""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm  # Detectron2 needs it too

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import FocalRetinaNet

from . import report
from .console import LOGGERS
from .signals import Interrupted, StopRequests

__all__ = ["Evaluation", "Progress", "Results"]

logger = logging.getLogger("retina_plugin")

_MAX_LINES = 20  # of progress, where there is no bar
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Evaluation(hooks.EvalHook):
    """Detectron2's hook, which a signal cuts short and which a full disk does not stop.

    It evaluates at the end of a training only if the training got there: Detectron2's also does if
    the last iteration failed.

    Args:
        period: iterations from one evaluation to the next; 0: only at the end.
        evaluate: returns a nested dict of metrics.
        requests: returns those of this training.
        on_interrupt: called when a signal cuts an evaluation off; the main process can save there.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Mapping[str, Any]],
        requests: Callable[[], StopRequests],
        on_interrupt: Callable[[], None],
    ) -> None:
        super().__init__(period, evaluate)
        self._requests, self._on_interrupt = requests, on_interrupt

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def _do_eval(self) -> None:
        requests, main = self._requests(), comm.is_main_process()
        if any(comm.all_gather(requests.received is not None)):
            self._on_interrupt()
            comm.synchronize()
            raise Interrupted
        try:
            # The main process can save alone, and the others end with it.
            with requests.raised_at_once() if main else contextlib.nullcontext():
                super()._do_eval()
        except Interrupted:
            self._on_interrupt()
            raise
        except RuntimeError:
            if main or requests.received is None:
                raise
            raise Interrupted from None  # the main process got the signal too, and is gone
        except OSError as error:  # only the main process writes
            if error.errno not in _DISK_ERRORS:
                raise
            if comm.get_world_size() > 1 and len(self.trainer.cfg.DATASETS.TEST) > 1:
                # The other processes are at the next test set, where they would wait for ever.
                raise ConfigError(
                    f"the evaluation after iteration {self.trainer.iter + 1} cannot be written "
                    f"({error}): make room, then --resume goes on from the last checkpoint"
                ) from None
            logger.error(
                "The evaluation after iteration %d failed (%s); the training goes on",
                *(self.trainer.iter + 1, error),
            )
            comm.synchronize()


class Progress(HookBase):
    """Says what is trained, how far it is, and the AP of each evaluation.

    On a terminal it shows a bar with loss, time left and memory; log lines appear above the bar,
    and Detectron2's progress lines are in the log file only. Elsewhere it logs at most some twenty
    lines over the whole training.

    Args:
        cfg: of the training.
        stream: what the bar is printed on; None for ``sys.stdout``.
    """

    def __init__(self, cfg: CfgNode, stream: TextIO | None = None) -> None:
        self._cfg = cfg
        self._stream = sys.stdout if stream is None else stream
        self._bar: tqdm | None = None
        self._undo = contextlib.ExitStack()

    def before_train(self) -> None:
        for title, text in _describe(self.trainer, self._cfg):
            logger.info("%-11s %s", title, text)
        self._period = _round_period(self.trainer.max_iter - self.trainer.start_iter)
        self._evaluation: Mapping[str, Any] = self.trainer.last_evaluation
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
        for name in LOGGERS:
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                    handler.addFilter(_not_progress)
                    handler.setStream(_AboveBar(self._stream))
                    self._undo.callback(handler.setStream, sys.stdout)
                    self._undo.callback(handler.removeFilter, _not_progress)

    def after_step(self) -> None:
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        if self.trainer.last_evaluation is not self._evaluation:
            self._evaluation = self.trainer.last_evaluation
            for name, metrics in report.metrics_by_dataset(self._cfg, self._evaluation).items():
                # NaN is a metric that no box counts for, e.g. APl without large boxes.
                text = ", ".join(f"{k} {v:.1f}" for k, v in metrics.items() if not math.isnan(v))
                logger.info("Evaluation of iteration %d on %s: %s", done, name, text or "no AP")
        if self._bar is not None:
            self._update_bar(self._bar)
        # The first line comes early, because it says how long the training will take.
        elif done % self._period == 0 or done in (end, self.trainer.start_iter + 20):
            self._log_line(done, end)

    def _update_bar(self, bar: tqdm) -> None:
        postfix = {"mem": f"{_memory_gib():.1f}G"}
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            postfix["loss"] = f"{latest['total_loss'][0]:.3f}"
        bar.set_postfix(postfix, refresh=False)
        bar.update(self.trainer.iter + 1 - bar.n)

    def _log_line(self, done: int, end: int) -> None:
        histories = self.trainer.storage.histories()
        parts = [f"iteration {done:{len(str(end))}}/{end}"]
        if "total_loss" in histories:  # on a GPU, losses are logged some iterations late
            parts.append(f"loss {histories['total_loss'].median(20):.3f}")
        if "lr" in histories:
            parts.append(f"lr {histories['lr'].latest():.4g}")
        if "time" in histories:
            seconds = int(histories["time"].median(1000) * (end - done))
            parts.append(f"{datetime.timedelta(seconds=seconds)} left")
        logger.info("  ".join(parts))

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._undo.close()


def _describe(trainer: Any, cfg: CfgNode) -> list[tuple[str, str]]:
    """The lines of the start-up summary, as (title, text)."""
    model: nn.Module = getattr(trainer.model, "module", trainer.model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{type(model).__name__}, {parameters / 1e6:.1f} million trainable parameters"
    lines = [("Model", text)]
    if isinstance(model, FocalRetinaNet):
        retinanet = cfg.MODEL.RETINANET
        lines += [("Loss", f"{retinanet.CLS_LOSS} and {retinanet.BBOX_REG_LOSS_TYPE}")]
    if trainer.start_iter:
        lines += [("Weights", f"the last checkpoint of {cfg.OUTPUT_DIR}")]
    else:
        lines += [("Weights", cfg.MODEL.WEIGHTS or "random (trained from scratch)")]
    images = _num_images(trainer.data_loader)
    of_images = "" if images is None else f": {images} images"
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    lines += [("Trained on", f"{', '.join(cfg.DATASETS.TRAIN)}{of_images}, {classes} classes")]
    if cfg.DATASETS.TEST:
        period = cfg.TEST.EVAL_PERIOD
        when = f"every {period} iterations and at the end" if period > 0 else "at the end"
        lines += [("Tested on", f"{', '.join(cfg.DATASETS.TEST)}, {when}")]
    processes = comm.get_world_size()
    lines += [("Device", cfg.MODEL.DEVICE + (f", {processes} processes" if processes > 1 else ""))]
    batch, end = cfg.SOLVER.IMS_PER_BATCH, trainer.max_iter
    text = f"{end} iterations of {batch} images"
    if images:
        text += f" ({end * batch / images:.1f} epochs)"
    if trainer.start_iter:
        text += f", of which {trainer.start_iter} are done"
    return [*lines, ("Length", text), ("Log", str(Path(cfg.OUTPUT_DIR) / "log.txt"))]


def _num_images(loader: Any) -> int | None:
    """Images of the dataset under Detectron2's layers of loaders; None if it has no length."""
    while hasattr(loader, "dataset"):
        loader = loader.dataset
    return len(loader) if hasattr(loader, "__len__") else None


def _round_period(iterations: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... with at most ``_MAX_LINES`` periods."""
    period = 1
    while period * _MAX_LINES < iterations:
        period = period * 5 // 2 if str(period).startswith("2") else period * 2
    return period


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
    """Peak memory: of the GPU if one is used, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Results(HookBase):
    """At the end of a training: two pictures, the table of metrics, and where the files are.

    Args:
        cfg: of the training.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # an exception ended the training
        out = Path(self._cfg.OUTPUT_DIR)
        try:
            self._draw(out)
        except OSError as error:
            logger.warning("cannot draw the results: %s", error)
        report.log_results(self._cfg, self.trainer.last_evaluation)
        for title, name in (
            ("Weights", "model_final.pth"),
            ("Best AP", "model_best.pth"),
            ("Numbers", "metrics.json"),
            ("Log", "log.txt"),
        ):
            if (out / name).is_file():
                logger.info("%-11s %s", title, out / name)

    def _draw(self, out: Path) -> None:
        metrics = out / "metrics.json"
        if metrics.is_file() and report.read_metrics(metrics):
            report.draw_training_curves(metrics, out / "training_curves.png")
        report.draw_detections(self._cfg, self.trainer.model, out / "detections.png")
