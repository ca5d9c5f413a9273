"""``OUTPUT_DIR``: one training at a time, and nothing of an earlier one is overwritten."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from detectron2.utils import comm

from retina_plugin.errors import ConfigError

__all__ = ["begin", "begun_anew", "claim", "make", "release", "run_on_main_process", "unusable"]

logger = logging.getLogger("retina_plugin")

_LOCK = ".lock"
# What a training writes and the next one in the folder would overwrite or mistake for its own.
_FILES = re.compile(
    r"model_\d{7}\.pth|model_(final|best)\.pth|model_best\.json|last_checkpoint|metrics\.json|"
    r"events\.out\.tfevents\..*|(training_curves|detections)\.png|inference|"
    r"tracking_(wandb|mlflow)\.json"
)
_ROOM = 2**18  # bytes that a disk must have; the first lines of the log and the config need them
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Folder -> its lock file, of the trainings of this process. Closing any descriptor of the file
# would release the lock, so there is one.
_claimed: dict[Path, IO[str]] = {}


def run_on_main_process(work: Callable[[], None]) -> None:
    """Call ``work`` in the main process; its :class:`ConfigError` is raised in all processes."""
    message = None
    if comm.is_main_process():
        try:
            work()
        except ConfigError as error:
            message = str(error)
    message = comm.all_gather(message)[0]
    if message is not None:
        raise ConfigError(message)


def make(folder: str) -> None:
    """Make the folder, if it is not there, and write to it.

    Raises:
        ConfigError: it cannot be written to, or the disk is full.
    """
    if not folder:
        raise ConfigError("OUTPUT_DIR is empty: name a folder")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unusable(folder, error) from None


def claim(folder: str) -> None:
    """Make the folder, and keep other trainings out of it until :func:`release`.

    A lock of the kernel does that, so a process that is killed leaves nothing locked. It is a lock
    of the process and not of the open file, so the data loader's workers do not hold it.

    Args:
        folder: ``OUTPUT_DIR``.

    Raises:
        ConfigError: the folder cannot be written to, or another training uses it.
    """
    path = Path(folder).resolve()
    if folder and path in _claimed:
        return
    make(folder)
    try:
        file = open(path / _LOCK, "a+")  # noqa: SIM115
    except OSError as error:
        raise unusable(folder, error) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            holder = _read_lock(path)
            file.close()
            raise ConfigError(
                f"OUTPUT_DIR {folder} is in use by another training (process "
                f"{holder.get('pid', '?')} on {holder.get('host', '?')}): wait for its end, or "
                "name another folder"
            ) from None
        logger.warning("OUTPUT_DIR %s cannot be locked: do not start two trainings in it", folder)
    _claimed[path] = file
    try:
        # Kept: an earlier process may have been killed while it moved the files away.
        _write_lock(path, begun_anew(folder))
    except OSError as error:
        release(folder)
        raise unusable(folder, error) from None


def release(folder: str) -> None:
    """Let other trainings use the folder. Without :func:`claim`, nothing happens."""
    file = _claimed.pop(Path(folder).resolve(), None)
    if file is not None:
        with contextlib.suppress(OSError):  # the disk is full, and the rest is not written
            file.close()


def begun_anew(folder: str) -> bool:
    """Whether a training was killed while it moved the files of an earlier one away."""
    return _read_lock(Path(folder).resolve()).get("begins", False) is True


def begin(folder: str, *, resumed: bool = False) -> None:
    """Move what an earlier training left in the folder to ``earlier-1`` (``-2``, ...) there.

    Args:
        folder: a claimed one.
        resumed: the files are those of this training, and stay.

    Raises:
        ConfigError: they cannot be moved.
    """
    path = Path(folder).resolve()
    try:
        found = [] if resumed else [p for p in path.iterdir() if _FILES.fullmatch(p.name)]
        if found:
            # What a kill leaves here is not to be resumed: a part of the earlier training.
            _write_lock(path, begins=True)
            taken = [p.name.removeprefix("earlier-") for p in path.glob("earlier-*")]
            number = 1 + max((int(text) for text in taken if text.isdecimal()), default=0)
            earlier = path / f"earlier-{number}"
            earlier.mkdir()
            for entry in found:
                entry.rename(earlier / entry.name)
            logger.warning(
                "OUTPUT_DIR held an earlier training: its %d files are in %s now",
                *(len(found), Path(folder, earlier.name)),
            )
        _write_lock(path, begins=False)
    except OSError as error:
        raise unusable(folder, error) from None


def unusable(folder: str, error: OSError) -> ConfigError:
    """What to raise if ``OUTPUT_DIR`` cannot be written to."""
    return ConfigError(
        f"OUTPUT_DIR {folder} cannot be written to ({error.strerror or error}): name a folder that "
        "can, or make room"
    )


def _write_lock(path: Path, begins: bool) -> None:
    file = _claimed[path]
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "begins": begins}))
    file.flush()
    os.fsync(file.fileno())


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        if path in _claimed:
            file = _claimed[path]
            file.seek(0)
            content = json.loads(file.read())
        else:
            content = json.loads((path / _LOCK).read_text())
    except (OSError, ValueError):
        return {}  # there is none yet
    return content if isinstance(content, dict) else {}
