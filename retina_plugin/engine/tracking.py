"""Weights & Biases and MLflow: what TensorBoard gets is sent to their clients (``TRACKING``)."""

from __future__ import annotations

import abc
import contextlib
import importlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from retina_plugin.cache import atomic_write
from retina_plugin.config import flatten
from retina_plugin.errors import first_line

from .signals import Interrupted

__all__ = ["MLflowWriter", "TrackingWriter", "WandbWriter", "build_tracking_writers"]

logger = logging.getLogger("retina_plugin")

_WINDOW = 20  # iterations over which Detectron2's writers take the median
_RECORDS = 256  # that wait for a client: those of some 5000 iterations
_PATIENCE = 30.0  # seconds that the end of a training waits for a client


class _Record(NamedTuple):
    """What a training measured in an iteration."""

    step: int
    scalars: dict[str, float]
    pictures: dict[str, Any]  # as `put_image` got them


class TrackingWriter(EventWriter, abc.ABC):
    """Sends the event storage's scalars and pictures to a run of a client.

    The client works in a thread of its own, because a server that does not answer can hold a call
    for minutes. An error of the client is one warning, and the training goes on.
    ``OUTPUT_DIR/tracking_CLIENT.json`` keeps the run and the last iteration that it got, so a
    resumed training goes on in the same run and sends nothing twice.

    Args:
        cfg: its keys are the run's parameters.
        resumed: whether the training goes on from a checkpoint.
    """

    client: str  # name of the module

    def __init__(self, cfg: CfgNode, resumed: bool) -> None:
        self._folder = Path(cfg.OUTPUT_DIR)
        self._params, self._config = flatten(cfg), cfg.dump()
        self._path = self._folder / f"tracking_{self.client}.json"
        run, self._last = _read(self._path) if resumed else ("", -1)
        self._warned = False
        self._error: BaseException | None = None  # that ended the training
        self._queue: queue.Queue[_Record | None] = queue.Queue(_RECORDS)
        # A daemon: the end of the process does not wait for it.
        self._thread = threading.Thread(
            target=self._work, args=(run, self._last), name=self.client, daemon=True
        )
        self._thread.start()

    def write(self) -> None:
        """Hand what is new in the event storage to the client's thread."""
        storage = get_event_storage()
        found: dict[int, _Record] = {}
        for name, (value, step) in storage.latest_with_smoothing_hint(_WINDOW).items():
            found.setdefault(step, _Record(step, {}, {})).scalars[name] = float(value)
        # Detectron2's TensorBoard writer clears them, so it has to come after this one.
        for name, picture, step in storage._vis_data:
            found.setdefault(step, _Record(step, {}, {})).pictures[name] = picture
        # In order, because Weights & Biases drops what comes after a later iteration.
        for step in sorted(step for step in found if step > self._last):
            self._last = step
            if self._thread.is_alive():
                try:
                    self._queue.put_nowait(found[step])
                except queue.Full:
                    self._warn("does not answer, and loses what comes now")

    def close(self) -> None:
        """End the run: finished, failed or, after a signal, interrupted."""
        self._error = sys.exc_info()[1]  # the trainer closes the writers in a `finally`
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_PATIENCE if self._thread.is_alive() else 0)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not finish within {_PATIENCE:.0f} s (is its server away?)")

    def _work(self, run: str, last: int) -> None:
        hint = f" (run {run}; without {self._path} another is begun)" if run else ""
        try:
            run = self._start(importlib.import_module(self.client), run)
        except Exception as error:
            self._warn(f"cannot be used{hint}", error)
            return
        with self._survive():
            self._save(run, last)
        while (record := self._queue.get()) is not None:
            with self._survive():
                if record.scalars:
                    self._log(record.scalars, record.step)
                for name, picture in record.pictures.items():
                    self._show(name, _to_rgb(picture), record.step)
                self._save(run, record.step)
        with self._survive():
            self._finish(self._error)

    @contextlib.contextmanager
    def _survive(self) -> Any:
        try:
            yield
        except Exception as error:
            self._warn("cannot write", error)

    def _warn(self, what: str, error: Exception | None = None) -> None:
        text = "" if error is None else f": {first_line(error)}"
        if not self._warned:
            logger.warning("%s %s%s. The training goes on", self.client, what, text)
        logger.debug("%s %s", self.client, what, exc_info=error)
        self._warned = True

    def _save(self, run: str, last: int) -> None:
        with atomic_write(self._path) as temporary:
            temporary.write_text(json.dumps({"run": run, "iteration": last}))

    @abc.abstractmethod
    def _start(self, client: Any, run: str) -> str:
        """Begin a run if ``run`` is "", else go on with it. Returns its id."""

    @abc.abstractmethod
    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send values of an iteration."""

    @abc.abstractmethod
    def _show(self, name: str, picture: np.ndarray, step: int) -> None:
        """Send an (H, W, 3) uint8 RGB picture."""

    @abc.abstractmethod
    def _finish(self, error: BaseException | None) -> None:
        """End the run. ``error`` ended the training, or None."""


class WandbWriter(TrackingWriter):
    """Weights & Biases. ``WANDB_PROJECT``, ``WANDB_MODE`` and its other variables are obeyed."""

    client = "wandb"

    def _start(self, client: Any, run: str) -> str:
        mode = os.environ.get("WANDB_MODE", "online")
        # Without `prompt` it would ask for the key on the terminal, in the middle of a training.
        if mode in ("online", "shared") and not client.login(prompt=False):
            raise RuntimeError(
                "no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
            )
        self._wandb = client
        self._wandb_run = client.init(
            id=run or None,
            resume="allow" if run else None,
            name=os.environ.get("WANDB_NAME") or self._folder.resolve().name,
            dir=os.environ.get("WANDB_DIR") or str(self._folder),
            # log.txt has what the training prints. At the end of the process, too, it does not wait
            # for a server that is away; what was not sent stays in the folder for `wandb sync`.
            settings=client.Settings(console="off", finish_timeout=_PATIENCE - 5),
        )
        self._wandb_run.config.update(self._params, allow_val_change=True)
        return str(self._wandb_run.id)

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        self._wandb_run.log(dict(scalars), step=step)

    def _show(self, name: str, picture: np.ndarray, step: int) -> None:
        self._wandb_run.log({name: self._wandb.Image(picture)}, step=step)

    def _finish(self, error: BaseException | None) -> None:
        if isinstance(error, Interrupted):
            self._wandb_run.mark_preempting()  # its page says so, and not that the run failed
        self._wandb_run.finish(exit_code=0 if error is None else getattr(error, "code", None) or 1)


class MLflowWriter(TrackingWriter):
    """MLflow. ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and the others are obeyed."""

    client = "mlflow"

    def __init__(self, cfg: CfgNode, resumed: bool) -> None:
        # Before its import. Only the tracking server gets something.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # It would draw from the training's random numbers when it tries again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        super().__init__(cfg, resumed)

    def _start(self, client: Any, run: str) -> str:
        self._mlflow = client
        name = self._folder.resolve().name or "training"  # else it draws one at random, as above
        started = client.start_run(run_id=run or None, run_name=name)
        if not run:  # parameters of a run cannot be changed
            client.log_params(self._params)
        client.log_text(self._config, "config.yaml")
        return str(started.info.run_id)

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        named = {re.sub(r"[^\w\-./ :]", "_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(named, step=step)

    def _show(self, name: str, picture: np.ndarray, step: int) -> None:
        key = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
        self._mlflow.log_image(picture, key=key, step=step, synchronous=True)

    def _finish(self, error: BaseException | None) -> None:
        ended = "FINISHED" if error is None else "FAILED"
        self._mlflow.end_run("KILLED" if isinstance(error, Interrupted) else ended)


def build_tracking_writers(cfg: CfgNode, resumed: bool) -> list[EventWriter]:
    """The writers that ``TRACKING`` names; only the main process may call it."""
    writers = {"wandb": WandbWriter, "mlflow": MLflowWriter}
    return [writers[name](cfg, resumed) for name in cfg.TRACKING]


def _read(path: Path) -> tuple[str, int]:
    """Run and last iteration of an earlier process; ("", -1) if there was none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["run"]), int(content["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", -1


def _to_rgb(picture: Any) -> np.ndarray:
    """(3, H, W) uint8 or float from 0 to 1, tensor or array -> (H, W, 3) uint8."""
    array = np.asarray(picture.detach().cpu() if isinstance(picture, torch.Tensor) else picture)
    if array.dtype != np.uint8:
        array = (array * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))
