"""``retina split SPEC --output DIR``: a training and a validation set out of one dataset."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from retina_plugin.cache import atomic_write
from retina_plugin.data import register_datasets
from retina_plugin.data.formats import unknown_dataset
from retina_plugin.data.splitting import group_by, split
from retina_plugin.doctor.annotations import check_annotations
from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.reading import read_annotations
from retina_plugin.engine.console import console
from retina_plugin.errors import ConfigError

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina split",
        description="Split a dataset into train.json and val.json, by image or by group. Images "
        "stay where they are.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="e.g. voc:cars or coco:all.json:images/")
    parser.add_argument("--output", required=True, metavar="DIR", help="for both files")
    parser.add_argument(
        "--val", type=float, default=0.2, metavar="SHARE", help="of the images, to validate (0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one is another split (0)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--group",
        default="",
        metavar="KEY",
        help="keep images together that have the same value of this key, or the same `folder`",
    )
    group.add_argument(
        "--group-pattern",
        default="",
        metavar="REGEX",
        help="keep images together whose names match alike, e.g. '(.*)_[0-9]+' for video frames",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: the dataset cannot be read or split, or the files cannot be written.
    """
    args = argument_parser().parse_args(argv)
    files = [Path(args.output, f"{part}.json") for part in ("train", "val")]
    for file in files:
        if file.exists() and not args.overwrite:
            raise ConfigError(f"{file} is there: name another --output, or add --overwrite")
    with console(0):
        content, image_root = _read(args.dataset)
        by_group = args.group or args.group_pattern
        group = group_by(args.group, args.group_pattern) if by_group else None
        parts = split(content, args.val, args.seed, group)
    for file, part in zip(files, parts):
        try:
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(part), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror or error}") from None
    print(_table(content, parts))
    for name in _missing(content, parts):
        print(f"warning: {name}")
    root = _short(image_root)
    names = [f"coco:{file}:{root}" for file in files]
    print(f'\nNext, in a config:\n\nDATASETS:\n  TRAIN: ["{names[0]}"]\n  TEST: ["{names[1]}"]')


def _read(name: str) -> tuple[dict[str, Any], str]:
    """The content of the annotation file, and the folder of its images."""
    register_datasets([name])
    if name not in DatasetCatalog:
        raise ConfigError(unknown_dataset(name))
    metadata = MetadataCatalog.get(name)
    prepare = metadata.get("prepare")
    if prepare is not None:
        prepare()
    json_file = metadata.get("json_file")
    if json_file is None:
        raise ConfigError(f"{name} has no annotation file in COCO's format: it cannot be split")
    content = read_annotations(json_file)
    for finding in check_annotations(str(json_file), content, train=False, test=False):
        if finding.severity is Severity.ERROR:
            raise ConfigError(f"{finding.where}: {finding.what} (`retina doctor` lists all)")
    return content, str(metadata.get("image_root") or "")


def _short(folder: str) -> str:
    """A path as one would write it: relative to the working directory if it lies within it."""
    relative = os.path.relpath(folder or ".")
    return relative if not relative.startswith("..") else os.path.abspath(folder)


def _counts(part: dict[str, Any]) -> Counter:
    return Counter(annotation["category_id"] for annotation in part["annotations"])


def _table(content: dict[str, Any], parts: tuple[dict[str, Any], ...]) -> str:
    counts = [_counts(part) for part in parts]
    rows = [["images", *(len(part["images"]) for part in parts)]]
    rows += [["boxes", *(sum(count.values()) for count in counts)]]
    rows += [[f"  {c['name']}", *(n[c["id"]] for n in counts)] for c in content["categories"]]
    return tabulate(rows, ["", "train", "val"], tablefmt="simple", preserve_whitespace=True)


def _missing(content: dict[str, Any], parts: tuple[dict[str, Any], ...]) -> list[str]:
    counts = [_counts(part) for part in parts]
    return [
        f"{side} has no box of the class '{category['name']}': try another --seed"
        for category in content["categories"]
        for side, count in zip(("train", "val"), counts)
        if count[category["id"]] == 0
    ]
