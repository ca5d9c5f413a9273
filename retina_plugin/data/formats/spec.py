"""Names of datasets that say where the data are: ``coco:cars/train.json:cars/images/``."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog

from retina_plugin.errors import ConfigError, did_you_mean

__all__ = ["FORMATS", "Spec", "folder_name", "parse", "similar_datasets", "unknown_dataset"]

# Format -> how a name of it is written. What stands in brackets may be left out.
FORMATS = {
    "coco": "coco:FILE.json[:IMAGES]",
    "voc": "voc:FOLDER[:SPLIT]",
    "yolo": "yolo:data.yaml[:SPLIT]",
    "csv": "csv:FILE.csv[:IMAGES]",
}

_LONGEST = 80  # characters of a folder's name before its digest; file systems allow 255 bytes


class Spec(NamedTuple):
    """The parts of a name.

    Args:
        format: a key of ``FORMATS``.
        path: of the file or folder, absolute.
        rest: what follows the path: a folder of images, absolute, or the name of a split; "" if
            there is none.
    """

    format: str
    path: str
    rest: str = ""


def parse(name: Any) -> Spec | None:
    """The parts of a dataset's name; None if it does not begin with a format.

        parse("voc:VOC2012:trainval")  # Spec("voc", "/home/me/VOC2012", "trainval")

    Paths are relative to the working directory, and may begin with "~". A colon can be a part of a
    path, if a file is there (``C:\\cars`` always is one path).

    Raises:
        ConfigError: no path follows the format.
    """
    form, colon, text = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or form not in FORMATS:
        return None
    path, rest = _split(text)
    if not path.strip():
        raise ConfigError(f"{name}: no path follows: write {FORMATS[form]}")
    if rest and form in ("coco", "csv"):
        rest = _absolute(rest)
    return Spec(form, _absolute(path), rest)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _split(text: str) -> tuple[str, str]:
    """The path, and what follows its colon. The longest path that is there wins."""
    cuts = list(_colons(text))
    for cut in [len(text), *reversed(cuts)]:
        if os.path.exists(os.path.expanduser(text[:cut])):
            return text[:cut], text[cut + 1 :]
    if not cuts:
        return text, ""
    return text[: cuts[0]], text[cuts[0] + 1 :]


def _colons(text: str) -> Iterator[int]:
    """Where colons are, except that of a Windows drive."""
    start = 0
    for match in re.finditer(":", text):
        i = match.start()
        if re.fullmatch(r"[A-Za-z]:[\\/]", text[start : i + 2]) is None:
            yield i
            start = i + 1


def folder_name(name: str) -> str:
    """A dataset's name as the name of a file or folder.

    A name that was registered by hand stays as it is. One that holds paths gets a digest, because
    two of them may differ in signs only that are replaced.

        folder_name("coco_2017_val")  # "coco_2017_val"
        folder_name("voc:VOC2012:val")  # "voc-VOC2012-val-a9e11c24"
    """
    if name.partition(":")[0] not in FORMATS or ":" not in name:
        return name
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-")[:_LONGEST]
    plain = plain.encode("utf-8", "replace")[: 2 * _LONGEST].decode("utf-8", "ignore")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain}-{digest}"


def unknown_dataset(name: str) -> str:
    """Why a name stands for no dataset, with similar ones."""
    return f"no dataset '{name}' is registered{similar_datasets(name)}"


def similar_datasets(name: str) -> str:
    """ " (did you mean 'coco:cars.json'?)", or "" if nothing is near."""
    near = _similar_spec(name)
    return f" (did you mean '{near}'?)" if near else did_you_mean(name, DatasetCatalog.list())


def _similar_spec(name: str) -> str:
    form, colon, rest = name.partition(":")
    if colon:
        near = difflib.get_close_matches(form.strip().lower(), FORMATS, n=1)
        return f"{near[0]}:{rest}" if near else ""
    by_suffix = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".csv": "csv"}
    form = by_suffix.get(os.path.splitext(name)[1].lower(), "")
    if os.path.isdir(os.path.join(name, "Annotations")):
        form = "voc"
    return f"{form}:{name}" if form else ""
