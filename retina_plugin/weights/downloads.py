"""Weights that a URL names: downloaded once, verified whenever they are read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from detectron2.utils.file_io import PathManager

from retina_plugin.cache import Fingerprint, atomic_write, only_writer

from .torch_files import OLD_FORMAT

__all__ = ["converted_file", "download", "split_query"]

logger = logging.getLogger("retina_plugin")


def download(path: str) -> str:
    """The local file of ``path``; a URL is downloaded if it is not in the cache, or damaged there.

    The cache is that of Detectron2's ``PathManager``. A fingerprint is kept beside each file. A
    file that Detectron2 has put there has none, so only its beginning and its end are looked at.

        file = download("detectron2://ImageNetPretrained/MSRA/R-50.pkl")

    Raises:
        Exception: the download fails; it can in many ways.
    """
    local = PathManager.get_local_path(path)
    if "://" not in path or not os.path.isfile(local) or _is_intact(Path(local)):
        return local
    with only_writer(Path(local).parent):
        if not _is_intact(Path(local)):  # no other process was faster
            logger.warning("%s is damaged: downloading it again", local)
            os.remove(local)
            local = PathManager.get_local_path(path)
            _fingerprint_of(Path(local)).write_text(json.dumps(Fingerprint.of(local)))
    return local


def split_query(path: str) -> tuple[str, str]:
    """A path or URL, and what stands after its "?", such as ``matching_heuristics=True``.

    The "?" of a file that is there, or of a folder, belongs to its name.
    """
    if os.path.isfile(path):
        return path, ""
    if "://" in path:
        file, _, query = path.partition("?")
        return file, query
    file, mark, query = path.rpartition("?")
    return (file, query) if mark and os.sep not in query else (path, "")


def converted_file(file: Path, write: Callable[[Path], None]) -> Path:
    """A file of the cache that is made from a download; made if it is missing or damaged.

    Args:
        write: writes it to a path.

    Raises:
        Exception: what ``write`` raises; no new file is left.
    """
    with only_writer(file.parent):
        if not (_fingerprint_of(file).exists() and file.exists() and _is_intact(file)):
            if file.exists():
                logger.warning("%s is damaged: making it again", file)
            with atomic_write(file) as temporary:
                write(temporary)
            _fingerprint_of(file).write_text(json.dumps(Fingerprint.of(file)))
    return file


def _is_intact(file: Path) -> bool:
    record = _fingerprint_of(file)
    try:
        return Fingerprint(*json.loads(record.read_text())).matches(file)
    except (OSError, ValueError, TypeError):
        pass  # no fingerprint, or a damaged one
    if not _looks_whole(file):
        return False
    with contextlib.suppress(OSError):  # a cache of others, which this user only reads
        record.write_text(json.dumps(Fingerprint.of(file)))
    return True


def _fingerprint_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.fingerprint")


def _looks_whole(file: Path) -> bool:
    """Whether a pickle or a zip archive, which is what weights are, has its end."""
    with open(file, "rb") as stream:
        head = stream.read(len(OLD_FORMAT))
        if head.startswith(b"PK"):
            return zipfile.is_zipfile(stream)  # its directory is at the end
        if not head:
            return False
        if head == OLD_FORMAT:
            return True  # of torch.save before 1.6: its end is numbers
        stream.seek(-1, os.SEEK_END)
        is_pickle = head[:1] == b"\x80" and head[8:9] != b"{"  # otherwise safetensors
        return not is_pickle or stream.read() == b"."
