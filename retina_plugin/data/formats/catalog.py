"""Registers the datasets whose names say where they are, as COCO files for all that reads one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from retina_plugin.cache import Fingerprint, atomic_write, cache_root, only_writer
from retina_plugin.errors import ConfigError

from . import table, voc, yolo
from .content import Source
from .spec import Spec, parse

__all__ = ["register_datasets"]

logger = logging.getLogger("retina_plugin")

_VERSION = 1  # of the conversion: raise it when the same files give another result
_FINDERS = {"voc": voc.find, "yolo": yolo.find, "csv": table.find}

_INFO, _ANNOTATIONS = "info.json", "annotations.json"


class _Entry(NamedTuple):
    """What the catalogs hold of a dataset."""

    json_file: str
    image_root: str
    classes: list[str] | None  # None: not known until the file is loaded


def register_datasets(names: Iterable[Any]) -> None:
    """Register names such as ``voc:VOC2012:trainval`` in Detectron2's catalogs, under themselves.

        register_datasets(["coco:cars/train.json:cars/images/"])
        MetadataCatalog.get("coco:cars/train.json:cars/images/").thing_classes

    ``json_file`` of the metadata is an annotation file in COCO's format. Other formats are
    converted: once into the cache, and again when a file of theirs changes. Other names are left
    alone, and so is one that is registered already by hand. It may be called again, by several
    processes at once too.

    Data that are missing or broken raise nothing here, because a prediction does without them. The
    dataset raises when it is loaded, and the doctor reports it.

    Raises:
        ConfigError: a name has a format and no path.
    """
    for name in names:
        spec = parse(name)
        if spec is None or _is_foreign(name):
            continue
        try:
            _register(name, _prepare(name, spec))
        except ConfigError as error:
            _register_broken(name, error)


def _is_foreign(name: str) -> bool:
    return name in DatasetCatalog and DatasetCatalog[name].__module__ != __name__


def _register(name: str, entry: _Entry) -> None:
    def load() -> list[dict[str, Any]]:
        return load_coco_json(entry.json_file, entry.image_root, name)

    values = {"json_file": entry.json_file, "image_root": entry.image_root}
    metadata = MetadataCatalog.get(name)
    known = {key: metadata.get(key) for key in values}
    if name in DatasetCatalog and known == values and metadata.get("thing_classes"):
        return
    _forget(name)
    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name)
    metadata.set(evaluator_type="coco", **values)
    if entry.classes is not None:
        metadata.thing_classes = entry.classes


def _register_broken(name: str, error: ConfigError) -> None:
    message = str(error)

    def fail() -> list[dict[str, Any]]:
        raise ConfigError(message)

    _forget(name)
    DatasetCatalog.register(name, fail)
    MetadataCatalog.get(name).set(evaluator_type="coco", prepare=fail)


def _forget(name: str) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def _prepare(name: str, spec: Spec) -> _Entry:
    if spec.format == "coco":
        return _Entry(spec.path, spec.rest or os.path.dirname(spec.path), _coco_classes(spec.path))
    source = _FINDERS[spec.format](spec)
    folder = _cache_folder(name, spec, source.files)
    info = _read_info(folder)
    if info is None:
        info = _convert(name, folder, source)
    return _Entry(str(folder / _ANNOTATIONS), info["image_root"], info["classes"])


def _cache_folder(name: str, spec: Spec, files: Iterable[str]) -> Path:
    """It has the digest of what is read: paths, sizes and times of the last change."""
    digest = hashlib.sha256(json.dumps([_VERSION, spec]).encode())
    for file in dict.fromkeys(files):
        stamp = None
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(file)
            stamp = (status.st_size, status.st_mtime_ns)
        digest.update(f"{file}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    plain = re.sub(r"[^\w.-]+", "-", os.path.basename(spec.path), flags=re.ASCII)[:40]
    return cache_root() / "datasets" / f"{spec.format}-{plain}-{digest.hexdigest()[:16]}"


def _read_info(folder: Path) -> dict[str, Any] | None:
    """What was written with the annotations; None if they are not there or damaged."""
    try:
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        fingerprint = info["annotations"]
        if fingerprint and not Fingerprint(*fingerprint).matches(folder / _ANNOTATIONS):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return info


def _convert(name: str, folder: Path, source: Source) -> dict[str, Any]:
    """Write the annotations, unless another process has just done so."""
    try:
        with only_writer(folder.parent):
            info = _read_info(folder)
            if info is not None:
                return info
            logger.info("Reading %s (once, until it changes)", name)
            content, image_root = source.convert()
            classes = [category["name"] for category in content["categories"]]
            info = {"name": name, "image_root": image_root, "classes": classes}
            content["info"] = {"description": name}
            _write(folder, info, json.dumps(content))
            return info
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot write it as COCO to {folder}: {error.strerror or error}: make room or "
            "the folder writable, or name another one in the environment variable "
            "RETINA_PLUGIN_CACHE"
        ) from None


def _write(folder: Path, info: dict[str, Any], annotations: str | None) -> None:
    """Write both files at once, in the place of damaged ones."""
    with atomic_write(folder) as partial:
        partial.mkdir()
        info["annotations"] = None
        if annotations is not None:
            (partial / _ANNOTATIONS).write_text(annotations, encoding="utf-8")
            info["annotations"] = Fingerprint.of(partial / _ANNOTATIONS)
        (partial / _INFO).write_text(json.dumps(info), encoding="utf-8")
        if folder.is_dir():
            folder.rename(partial.parent / "damaged")  # deleted with the temporary folder


def _coco_classes(path: str) -> list[str] | None:
    """The classes of a COCO file by id; kept in the cache, because COCO's own takes seconds.

    None: the file cannot be read. The doctor, who reads it too, says why.
    """
    folder = _cache_folder("", Spec("coco", path), [path])
    info = _read_info(folder)
    if info is not None:
        return info["classes"]
    try:
        with open(path, "rb") as file:
            categories = json.load(file)["categories"]
        names = [category["name"] for category in sorted(categories, key=lambda x: x["id"])]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not names or not all(isinstance(name, str) for name in names):
        return None
    with contextlib.suppress(OSError), only_writer(folder.parent):  # a cache is no must here
        if _read_info(folder) is None:
            _write(folder, {"classes": names}, None)
    return names
