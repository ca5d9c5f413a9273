"""Detectron2's checkpointer: it writes whole files, finds damaged ones and runs nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError

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

    def _regular_checkpoints(self) -> Iterator[Path]:
        for path in Path(self.save_dir).glob("model_*.pth"):
            if _NUMBERED.fullmatch(path.name) or path.name == _FINAL:
                yield path

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint of the folder with all checkpointables.

        Without ``resume``, or if there is none, load the model alone from ``path``. With several
        processes all must call this: the first one decides which checkpoint is taken.

        Returns:
            What else is in the file, e.g. {"iteration": 999}; {} if there is nothing to load.
        """
        if resume:
            found = self.get_checkpoint_file() if comm.is_main_process() else ""
            found = comm.all_gather(found)[0]
            if found:
                return self.load(found)
        return self.load(path, checkpointables=[])

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Detectron2's, for a file of any format that :func:`read_checkpoint` knows.

        Raises:
            ConfigError: the file is damaged, no weights file, or would run code.
        """
        self.loaded_from = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an error

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)


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
    if name != os.path.basename(name) or name in (".", "..") or not name.isprintable():
        return None, f"{path} does not name a file of its folder, but {name[:200]!r}"
    return name, None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not path.exists():
        return f"there is no checkpoint {path}"
    try:
        read_checkpoint(path)
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
