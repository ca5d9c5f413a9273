"""Generated files that are kept between runs: the embedded dataset, weights, compiled kernels."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Fingerprint",
    "atomic_write",
    "cache_root",
    "only_writer",
    "remove_stale_temporaries",
]

# What is being written lies in a folder with this ending, which also holds the writer's lock.
_ENDING = ".partial"


def cache_root() -> Path:
    """``$RETINA_PLUGIN_CACHE``, or ~/.cache/retina_plugin if it is not set."""
    return Path(os.environ.get("RETINA_PLUGIN_CACHE", "~/.cache/retina_plugin")).expanduser()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all: neither a reader nor a power cut finds a part of it.

    Yields a temporary path to write to. At the end of the block the file is flushed to the disk and
    renamed to ``path``. If the block raises, it is deleted and ``path`` stays as it was. What a
    killed process left in the folder is deleted first.

        with atomic_write(cache_root() / "weights.pth") as temporary:
            torch.save(state, temporary)

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path.parent)
    with _locked_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    _flush(path.parent)  # the rename itself


def remove_stale_temporaries(folder: Path) -> None:
    """Delete what :func:`atomic_write` left behind in ``folder`` when its process was killed.

    The kernel releases a lock when its process ends, so a folder whose lock is free has no writer.
    """
    for temporary in folder.glob(f".*{_ENDING}"):
        # An error: another process writes there, or has just deleted it.
        with contextlib.suppress(OSError), open(temporary / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary)


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    while True:
        folder = Path(tempfile.mkdtemp(_ENDING, f".{path.name}.", path.parent))
        try:
            lock = open(folder / "lock", "a")  # noqa: SIM115
        except FileNotFoundError:
            continue  # another process took it for a stale one before it was locked
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "lock").exists():
            break
        lock.close()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Fingerprint(NamedTuple):
    """What tells whether a file of the cache is still as it was written.

    As in git's index, the content is read only if the time of the last change is another one: so
    thousands of files are checked in some hundredths of a second, and a copied cache is found
    intact too.
    """

    size: int  # bytes
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> Fingerprint:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        stat = os.stat(path)
        return cls(stat.st_size, stat.st_mtime_ns, sha256)

    def matches(self, path: str | Path) -> bool:
        """Whether ``path`` is a file with this content."""
        try:
            stat = os.stat(path)
            if stat.st_size != self.size:
                return False
            return stat.st_mtime_ns == self.mtime_ns or self.of(path).sha256 == self.sha256
        except OSError:
            return False


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block with ``folder``. Created if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
