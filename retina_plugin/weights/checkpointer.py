"""Detectron2's checkpointer: it writes whole files, finds damaged ones and runs nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _filter_reused_missing_keys

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError

from .classes import adapt_classes
from .conversion.loading import translate
from .downloads import split_query
from .fit import Fit, check_finite, class_counts, remove_prefixes
from .reading import read_checkpoint

__all__ = ["Checkpointer"]

logger = logging.getLogger("retina_plugin")

_LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_FINAL = "model_final.pth"


class Checkpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that loses nothing and runs nothing.

    A file is written whole or not at all. Reading runs no code from the file, whatever its format.
    A damaged checkpoint is found when a training resumes, and the newest whole one before it is
    taken. Arguments are Detectron2's.

        checkpointer = Checkpointer(model, "output/run", trainer=trainer)
        checkpointer.save("model_0000999", iteration=999)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
    """

    loaded_from = ""
    """The file or URL that was loaded last."""
    fit: Fit | None = None
    """What was loaded of it; None if nothing was."""
    class_names: list[str] | None = None
    """Of the model's classes; saved with it. Weights that are loaded are fitted to them, but not
    those that a training resumes from."""
    _fit_classes: Callable[..., None] | None = None
    _query = ""  # of what is loaded

    def save(self, name: str, *, tag: bool = True, **extra: Any) -> None:
        """Write the model, the checkpointables and ``extra`` to NAME.pth in the folder.

        Args:
            name: without ".pth".
            tag: make it the checkpoint to resume from.
            extra: what else to keep: tensors, numpy arrays and plain containers.

        Raises:
            OSError: the disk is full or read-only; one line with the path. The file that was there
                before is still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        if self.class_names:
            data["class_names"] = self.class_names
        data.update(extra)
        path = Path(self.save_dir, f"{name}.pth")
        logging.getLogger("fvcore").info("Saving checkpoint to %s", path)  # for log.txt
        with _errors_of(path), atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(data, file)
        if tag:
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of the folder the checkpoint to resume from.

        Raises:
            OSError: as :meth:`save`.
        """
        path = Path(self.save_dir, _LAST)
        with _errors_of(path), atomic_write(path) as temporary:
            temporary.write_text(last_filename_basename, encoding="utf-8")

    def has_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint to resume from. It may turn out to be damaged."""
        return Path(self.save_dir, _LAST).exists() or any(self._regular_checkpoints())

    def get_checkpoint_file(self) -> str:
        """The newest whole checkpoint of the folder, or "" if there is none.

        It is the one that ``last_checkpoint`` names. If that one is damaged, missing or no
        checkpoint, a warning says so, and the newest whole one before it is taken. ``model_best``
        and files with other names are not.
        """
        folder = Path(self.save_dir)
        name, problem = _read_last(folder / _LAST)
        if name is not None:
            problem = _problem(folder / name)
            if problem is None:
                return str(folder / name)
        elif problem is None and not any(self._regular_checkpoints()):
            return ""  # a new folder
        logger.warning("%s", problem or f"{folder / _LAST} is missing")
        numbered = _NUMBERED.fullmatch(name or "")
        before = int(numbered[1]) if numbered else float("inf")
        candidates = [
            (iteration, path)
            for path in self._regular_checkpoints()
            if path.name != name and (iteration := _iteration(path)) < before
        ]
        for _, path in sorted(candidates, reverse=True):
            problem = _problem(path)
            if problem is None:
                logger.warning("Taking %s, the newest whole checkpoint before it", path)
                return str(path)
            logger.warning("%s", problem)
        logger.warning("There is no whole checkpoint in %s", folder)
        return ""

    def _agreed_checkpoint_file(self) -> str:
        """:meth:`get_checkpoint_file` of the first process, for all of them."""
        found = self.get_checkpoint_file() if comm.is_main_process() else ""
        return str(comm.all_gather(found)[0])

    def _regular_checkpoints(self) -> Iterator[Path]:
        for path in Path(self.save_dir).glob("model_*.pth"):
            if _NUMBERED.fullmatch(path.name) or path.name == _FINAL:
                yield path

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint of the folder with all checkpointables.

        Without ``resume``, or if there is none, load the model alone from ``path``, fitted to
        ``class_names`` (:func:`.classes.adapt_classes`). All processes must call this: the first
        one decides which checkpoint is taken.

        Returns:
            What else is in the file, e.g. {"iteration": 999}; {} if there is nothing to load.
        """
        found = self._agreed_checkpoint_file() if resume else ""
        if found:
            return self.load(found)
        return self._load_fitted(path, adapt_classes)

    def load_complete(self, path: str, *, resume: bool = False) -> None:
        """Load the model alone, to evaluate it: from ``path``, or the newest whole checkpoint.

        Classes that the file has in another order than ``class_names``, or among others, are taken
        by their names. All processes must call this.

        Args:
            resume: take the newest whole checkpoint of the folder, if there is one.

        Raises:
            ConfigError: a tensor of the model is not in the file, or its classes are others.
        """
        if resume:
            path = self._agreed_checkpoint_file() or path
        self._load_fitted(path, functools.partial(adapt_classes, complete=True))
        self.check_complete()

    def _load_fitted(self, path: str, fit_classes: Callable[..., None]) -> dict[str, Any]:
        self._fit_classes = fit_classes
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._fit_classes = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Detectron2's, for a file of any format that :func:`read_checkpoint` knows.

        If something was not loaded, one line says how much; the names are in log.txt.

        Raises:
            ConfigError: the file is missing, damaged, no weights file, or would run code; it has
                numbers that are not finite; nothing of it fits the model.
        """
        self.loaded_from, self.fit = path, None
        file, self._query = split_query(path) if path else ("", "")
        try:
            # fvcore's: Detectron2's takes file names for URLs, so it cuts what?.pth and writes
            # Run:1.pth in lower case.
            return super(DetectionCheckpointer, self).load(file, *args, **kwargs)
        except AssertionError as error:  # it cannot find the file
            raise ConfigError(str(error)) from None

    def check_complete(self) -> None:
        """Stop an evaluation whose model was not loaded completely.

        Raises:
            ConfigError: nothing was loaded, or a tensor of the model was not in the file or had
                another shape there.
        """
        if self.fit is None:
            raise ConfigError(
                f"there are no weights to evaluate: {self.save_dir} has no whole checkpoint, and "
                "MODEL.WEIGHTS is empty"
            )
        self.fit.check_complete()

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        query = parse_qs(self._query)
        if query.pop("matching_heuristics", ["False"]) == ["True"]:
            checkpoint["matching_heuristics"] = True
        if query:
            raise ConfigError(
                f"{self.loaded_from}: unknown '{next(iter(query))}' after the '?'; known: "
                "matching_heuristics=True"
            )
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        check_finite(checkpoint["model"], self.loaded_from)
        checkpoint["model"] = remove_prefixes(checkpoint["model"], self.model.state_dict())
        translate(checkpoint, self.model, self.loaded_from)
        if self._fit_classes and self.class_names:
            self._fit_classes(checkpoint, self.model.state_dict(), self.class_names)
        try:
            with _for_log_file("detectron2.checkpoint.c2_model_loading"):
                return super()._load_model(checkpoint)
        except (ValueError, AssertionError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{self.loaded_from} does not fit the model: {reason}") from None

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        with _for_log_file("fvcore.common.checkpoint"):
            super()._log_incompatible_keys(incompatible)
        model = self.model.state_dict()
        names = [name for name in model if not name.endswith("num_batches_tracked")]
        shapes = tuple(incompatible.incorrect_shapes)
        missing = set(_filter_reused_missing_keys(self.model, incompatible.missing_keys))
        missing -= {name for name, _, _ in shapes}
        self.fit = Fit(
            path=self.loaded_from,
            total=len(names),
            missing=tuple(name for name in names if name in missing),
            other_shape=shapes,
            unused=tuple(sorted(incompatible.unexpected_keys)),
            classes=class_counts(shapes, model),
        )
        self.fit.check_any()
        if self.fit.missing or self.fit.other_shape or self.fit.unused:
            level = logging.WARNING if self.fit.other_shape else logging.INFO
            logger.log(level, "%-11s %s", "Loaded", self.fit)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Errors of writing ``path`` become an OSError with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns an error of the file into one of its own; the first one has the reason.
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        if not isinstance(first, OSError):
            raise
        raise OSError(f"cannot write {path}: {first.strerror or first}") from None


@contextlib.contextmanager
def _for_log_file(name: str) -> Iterator[None]:
    """Make the warnings of a logger lines for log.txt: the console shows their number instead."""

    def lower(record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True

    log = logging.getLogger(name)
    log.addFilter(lower)
    try:
        yield
    finally:
        log.removeFilter(lower)


def _read_last(path: Path) -> tuple[str | None, str | None]:
    """The name in ``last_checkpoint``, or what is wrong with it. (None, None): there is no file."""
    try:
        name = path.read_bytes().decode("utf-8").strip()
    except FileNotFoundError:
        return None, None
    except (OSError, UnicodeDecodeError) as error:
        return None, f"cannot read {path}: {error}"
    if not name:
        return None, f"{path} is empty"
    is_name = name == os.path.basename(name) and name not in (".", "..") and name.isprintable()
    if not is_name or len(name) > 255:
        return None, f"{path} does not name a file of its folder, but {name[:200]!r}"
    return name, None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not path.exists():
        return f"there is no checkpoint {path}"
    try:
        check_finite(read_checkpoint(path)["model"], str(path))
    except ConfigError as error:
        return str(error)
    return None


def _iteration(path: Path) -> int:
    """The iteration of a checkpoint, by its name or else by its content; -1 if it has none."""
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered:
        return int(numbered[1])
    try:
        iteration = read_checkpoint(path).get("iteration")
    except ConfigError:
        return -1
    return iteration if isinstance(iteration, int) else -1
