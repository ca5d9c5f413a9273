"""Experiment trackers that ``TRACKING`` names, as Detectron2's ``EventWriter``."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from retina_plugin.cache import atomic_write
from retina_plugin.config import flatten
from retina_plugin.errors import ConfigError, check_choice, first_line
from retina_plugin.registry import ComponentRegistry

from .signals import Interrupted
from .state import load_random_state, random_state

__all__ = [
    "TRACKER_REGISTRY",
    "MLflowWriter",
    "Tracker",
    "WandbWriter",
    "build_trackers",
    "check_trackers",
]

# Entries are subclasses of Tracker.
TRACKER_REGISTRY = ComponentRegistry("TRACKING", {"wandb": "WandbWriter", "mlflow": "MLflowWriter"})

logger = logging.getLogger("retina_plugin")

_RUNS = "tracking.json"  # in OUTPUT_DIR: class of a tracker -> id of its run


class Tracker(EventWriter, ABC):
    """Sends scalars, pictures and the config to a run of an experiment tracker.

    A resumed training goes on in its run. Whatever the client raises, the training goes on: there
    is one warning, and nothing more is sent.

    Args:
        cfg: of the training. Its keys are the run's parameters.
    """

    PACKAGE = ""  # checked before a training starts
    PIP = ""  # what pip installs it by

    def __init__(self, cfg: CfgNode) -> None:
        self._last_write = -1
        self._works = True
        # A client may draw a name at random: the training must not notice.
        state = random_state()
        self._try(lambda: self._start(cfg))
        load_random_state(state)

    @abstractmethod
    def start(self, cfg: CfgNode, run: str | None) -> str:
        """Begin a run, or go on with the one whose id is ``run``. Returns its id."""

    @abstractmethod
    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Send the scalars of an iteration."""

    @abstractmethod
    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Send a picture: (H, W, 3), RGB, uint8."""

    @abstractmethod
    def finish(self, error: BaseException | None) -> None:
        """End the run. ``error``: what ended the training, None if it is done."""

    def _start(self, cfg: CfgNode) -> None:
        path, name = Path(cfg.OUTPUT_DIR) / _RUNS, type(self).__name__
        runs = json.loads(path.read_text()) if path.is_file() else {}
        run = self.start(cfg, runs.get(name))
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**runs, name: run}))

    def write(self) -> None:
        """Send what came after the last call."""
        if self._works:
            self._try(self._write)

    def _write(self) -> None:
        storage = get_event_storage()
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(20).items():
            if iteration > self._last_write:
                new[iteration][name] = value
        for iteration, scalars in sorted(new.items()):
            self.log(scalars, iteration)
            self._last_write = iteration
        # TensorboardXWriter reads the same field. It empties it, so it must come later.
        for name, picture, iteration in storage._vis_data:
            image = np.asarray(picture).transpose(1, 2, 0)
            if image.dtype != np.uint8:
                image = (image * 255).round().astype(np.uint8)
            self.log_image(name, image, iteration)

    def close(self) -> None:
        """End the run as the training ended."""
        if self._works:
            # Detectron2 calls it in a `finally`, where the error of the training is at hand.
            error = sys.exc_info()[1]
            self._try(lambda: self.finish(error))
            self._works = False

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of any kind: clients wrap those of the network in their own
            self._works = False
            logger.warning(
                "%s cannot write: %s: %s. The training goes on without it",
                *(type(self).__name__, type(error).__name__, first_line(error)),
            )


@TRACKER_REGISTRY.register()
class WandbWriter(Tracker):
    """Weights & Biases. ``WANDB_PROJECT``, ``WANDB_MODE`` and the like configure it.

    Detectron2 gives the results of an evaluation after newer losses, which W&B's own step does not
    allow: the horizontal axis is the scalar ``iteration``.
    """

    PACKAGE = PIP = "wandb"

    def start(self, cfg: CfgNode, run: str | None) -> str:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            # It would ask for a key, and the training would wait for the answer.
            raise ConfigError("no login: run `wandb login`, or set WANDB_MODE=offline")
        run = run or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            id=run,
            resume="allow",
            name=os.environ.get("WANDB_NAME") or Path(cfg.OUTPUT_DIR).name,
            dir=os.environ.get("WANDB_DIR") or cfg.OUTPUT_DIR,
            config=flatten(cfg),
            allow_val_change=True,  # a resumed training may have other values
        )
        self._run.define_metric("*", step_metric="iteration")
        return run

    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        self._run.log({**scalars, "iteration": iteration})

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(image), "iteration": iteration})

    def finish(self, error: BaseException | None) -> None:
        if isinstance(error, Interrupted):
            self._run.mark_preempting()
        code = error.code if isinstance(error, SystemExit) else 1
        self._run.finish(exit_code=0 if error is None else code if isinstance(code, int) else 1)


@TRACKER_REGISTRY.register()
class MLflowWriter(Tracker):
    """MLflow. ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and the like configure it."""

    PACKAGE = PIP = "mlflow"

    def start(self, cfg: CfgNode, run: str | None) -> str:
        import mlflow

        name = os.environ.get("MLFLOW_RUN_NAME") or Path(cfg.OUTPUT_DIR).name
        active = mlflow.start_run(run_id=run, run_name=None if run else name)
        if run is None:  # a parameter cannot be changed
            mlflow.log_params({key: str(value)[:500] for key, value in flatten(cfg).items()})
        return str(active.info.run_id)

    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        import mlflow

        named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in scalars.items()}
        mlflow.log_metrics(named, step=iteration)

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        import mlflow

        mlflow.log_image(image, key=re.sub(r"[^\w\-. /]", "_", name), step=iteration)

    def finish(self, error: BaseException | None) -> None:
        import mlflow

        interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
        mlflow.end_run("FINISHED" if error is None else "KILLED" if interrupted else "FAILED")


def check_trackers(cfg: CfgNode) -> None:
    """Raise a ConfigError for an unknown tracker, or one whose client is not installed."""
    if isinstance(cfg.TRACKING, str) or len(set(cfg.TRACKING)) < len(cfg.TRACKING):
        raise ConfigError(f"TRACKING must be a list of names, each once, got {cfg.TRACKING!r}")
    for name in cfg.TRACKING:
        tracker = _class_of(name)
        if tracker.PACKAGE:
            try:
                __import__(tracker.PACKAGE)
            except ImportError as error:
                raise ConfigError(
                    f"TRACKING: {name} needs {tracker.PACKAGE} ({first_line(error)}): "
                    f"pip install {tracker.PIP}"
                ) from None


def build_trackers(cfg: CfgNode) -> list[EventWriter]:
    """The trackers that ``TRACKING`` names, with their runs begun. For the main process only."""
    return [_class_of(name)(cfg) for name in cfg.TRACKING]


def _class_of(name: str) -> Any:
    registry = TRACKER_REGISTRY
    check_choice(registry.key, name, [*registry.aliases, *sorted(known for known, _ in registry)])
    return registry.get(registry.aliases.get(name, name))
