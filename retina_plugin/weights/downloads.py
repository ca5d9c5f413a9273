"""Weights that a URL names: downloaded once, verified whenever they are read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zipfile
from pathlib import Path

from detectron2.utils.file_io import PathManager

from retina_plugin.cache import Fingerprint, only_writer

from .torch_files import OLD_FORMAT

__all__ = ["download"]

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
