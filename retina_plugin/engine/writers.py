"""The log files of a training: ``metrics.json``, TensorBoard's, and the progress in ``log.txt``."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter

from retina_plugin.cache import atomic_write
from retina_plugin.modeling.monitoring import LOG_PERIOD

__all__ = ["Writers", "trim_metrics"]

logger = logging.getLogger("retina_plugin")


class Writers(hooks.PeriodicWriter):
    """Detectron2's hook, which opens the files when the training begins, and survives a full disk.

    Args:
        build: makes the writers.
        period: iterations from one write to the next.
    """

    def __init__(self, build: Callable[[], list[EventWriter]], period: int = LOG_PERIOD) -> None:
        super().__init__([], period)
        self._build = build
        self._failed: set[str] = set()

    def before_train(self) -> None:
        self._excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        try:
            self._writers = self._build()
        except OSError as error:
            logger.warning("cannot open the log files: %s. The training goes on", error)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                self._try(writer, writer.write)

    def after_train(self) -> None:
        for writer in self._writers:
            # What hooks measured after the training, e.g. the last evaluation.
            self._try(writer, writer.write)
            self._try(writer, writer.close)
        threading.excepthook = self._excepthook

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread. Its next call tells of a full disk, so no traceback."""
        if not isinstance(args.exc_value, OSError):
            self._excepthook(args)

    def _try(self, writer: EventWriter, action: Callable[[], None]) -> None:
        name = type(writer).__name__
        try:
            action()
        except OSError as error:
            if name not in self._failed:
                logger.warning("%s cannot write: %s. The training goes on", name, error)
            self._failed.add(name)
        except ZeroDivisionError:
            # It divides by the iterations since it printed last: none, if an error ended the
            # training. That error is the one to see.
            if not isinstance(writer, CommonMetricPrinter):
                raise

    def show_pictures(self) -> bool:
        """Whether a writer may read the pictures of the event storage. These two do not."""
        return any(not isinstance(w, (CommonMetricPrinter, JSONWriter)) for w in self._writers)

    def last_written(self) -> dict[str, int]:
        """Name of a writer -> the last iteration that it wrote."""
        found = {type(w).__name__: getattr(w, "_last_write", None) for w in self._writers}
        # Detectron2's printer of progress keeps a time there.
        return {name: last for name, last in found.items() if isinstance(last, int)}

    def set_last_written(self, last: Mapping[str, int]) -> None:
        """Restore :meth:`last_written`, so that nothing is written twice."""
        for writer in self._writers:
            if type(writer).__name__ in last:
                writer._last_write = last[type(writer).__name__]


def trim_metrics(path: Path, last: int) -> None:
    """Drop the lines of ``metrics.json`` after iteration ``last``, and a line that was cut short.

    The resumed training writes them again.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and _iteration(line) <= last]
    if kept != lines:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _iteration(line: bytes) -> float:
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return iteration if isinstance(iteration, int) else float("inf")
