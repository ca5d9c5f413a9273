"""Training and validation sets out of one annotation file in COCO's format."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from typing import Any

from retina_plugin.errors import ConfigError, did_you_mean

__all__ = ["group_by", "split"]

Record = dict[str, Any]


def split(
    content: Record, val: float = 0.2, seed: int = 0, group: Callable[[Record], Any] | None = None
) -> tuple[Record, Record]:
    """Two files' contents, for training and validation, with all classes in both.

    An image, or a group of images, is in one of them only. Images with the same file count as one.
    Annotations of images that the file does not have are left out.
    The order of the groups is the digest of seed and group, so it does not depend on the file's.

        train, val = split(json.load(open("all.json")), 0.2, group=group_by("video_id"))

    Args:
        content: with images, annotations and categories.
        val: the share of the images for validation, between 0 and 1.
        seed: another one makes another split.
        group: image -> its group; None: each image is one.

    Raises:
        ConfigError: there are fewer than two groups, or the share is impossible.
    """
    if not 0 < val < 1:
        raise ConfigError(f"--val {val}: give a share of the images between 0 and 1")
    groups: dict[str, list[Record]] = {}
    files: dict[str, str] = {}  # of a file, its group
    for image in content["images"]:
        name = os.path.normpath(str(image["file_name"]))
        key = files.setdefault(name, name if group is None else repr(group(image)))
        groups.setdefault(key, []).append(image)
    if len(groups) < 2:
        raise ConfigError(
            f"{len(content['images'])} images are {len(groups)} group: a split needs two"
        )
    chosen = _choose(groups, val * len(content["images"]), seed)
    ids = {image["id"] for key in chosen for image in groups[key]}
    return _part(content, ids, False), _part(content, ids, True)


def _choose(groups: dict[str, list[Record]], target: float, seed: int) -> set[str]:
    """The groups for validation: as many images as come nearest to the target."""

    def digest(key: str) -> str:
        return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).hexdigest()

    order = sorted(groups, key=digest)
    chosen: set[str] = set()
    count = 0
    for key in order:
        size = len(groups[key])
        if abs(count + size - target) < abs(count - target):
            chosen.add(key)
            count += size
    if not chosen:
        chosen.add(min(order, key=lambda key: len(groups[key])))
    if len(chosen) == len(groups):
        chosen.remove(min(order, key=lambda key: len(groups[key])))
    return chosen


def _part(content: Record, ids: set[Any], inside: bool) -> Record:
    def keep(entries: list[Record], key: str) -> list[Record]:
        return [entry for entry in entries if (entry[key] in ids) == inside]

    known = {image["id"] for image in content["images"]}
    annotations = [a for a in content.get("annotations", []) if a["image_id"] in known]
    return {
        **content,
        "images": keep(content["images"], "id"),
        "annotations": keep(annotations, "image_id"),
    }


def group_by(key: str = "", pattern: str = "") -> Callable[[Record], Any]:
    """What puts images into groups.

    Args:
        key: of the image's record, e.g. "video_id"; "folder" is the folder of its file.
        pattern: instead of it, a regular expression that finds the group in the file's name: its
            first group in brackets, or all that it matches.

    Raises:
        ConfigError: the pattern is none. The result raises it for an image without a group.
    """
    if not pattern:
        return lambda image: _value(image, key)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"'{pattern}' is no regular expression: {error}") from None

    def search(image: Record) -> str:
        found = compiled.search(str(image["file_name"]))
        if found is None:
            raise ConfigError(f"'{pattern}' finds nothing in the name {image['file_name']}")
        return found.group(1 if compiled.groups else 0) or ""

    return search


def _value(image: Record, key: str) -> Any:
    if key == "folder":
        return os.path.dirname(os.path.normpath(str(image["file_name"])))
    if key not in image:
        raise ConfigError(
            f"the image {image['file_name']} has no '{key}'{did_you_mean(key, image)}; its keys: "
            f"{', '.join(map(str, image))}, and folder"
        )
    return image[key]
