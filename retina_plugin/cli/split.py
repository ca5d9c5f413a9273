"""``retina split SPEC --output DIR``: a training and a validation set out of one dataset."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from tabulate import tabulate

from retina_plugin.cache import atomic_write
from retina_plugin.data import register_datasets
from retina_plugin.data.formats import parse, unknown_dataset
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
    with console(0):
        metadata = _find(args.dataset)
        _check_output(files, args.dataset, metadata, args.overwrite)
        content = _read(str(metadata.json_file))
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
    for warning in (*_left_out(content), *_missing(content, parts)):
        print(f"warning: {warning}")
    root = _short(str(metadata.get("image_root") or ""))
    names = [f"coco:{file}:{root}" for file in files]
    print(f'\nNext, in a config:\n\nDATASETS:\n  TRAIN: ["{names[0]}"]\n  TEST: ["{names[1]}"]')


def _find(name: str) -> Metadata:
    """Of the dataset, with the annotation file in its place."""
    register_datasets([name])
    if name not in DatasetCatalog:
        raise ConfigError(unknown_dataset(name))
    metadata = MetadataCatalog.get(name)
    prepare = metadata.get("prepare")
    if prepare is not None:
        prepare()
    if metadata.get("json_file") is None:
        raise ConfigError(f"{name} has no annotation file in COCO's format: it cannot be split")
    return metadata


def _check_output(files: list[Path], name: str, metadata: Metadata, overwrite: bool) -> None:
    """Raise if a file is there, or if the dataset is read from it: a split would shrink it."""
    spec = parse(name)  # csv: and yolo: name a file that is not the metadata's
    inputs = [Path(metadata.json_file), *([Path(spec.path)] if spec else [])]
    there = [file for file in files if file.exists()]
    for file in there:
        if any(path.exists() and file.samefile(path) for path in inputs):
            raise ConfigError(f"{file} is a file that {name} is read from: name another --output")
    if there and not overwrite:
        raise ConfigError(f"{there[0]} is there: name another --output, or add --overwrite")


def _read(json_file: str) -> dict[str, Any]:
    content = read_annotations(json_file)
    for finding in check_annotations(json_file, content, train=False, test=False):
        if finding.severity is Severity.ERROR:
            raise ConfigError(f"{finding.where}: {finding.what} (`retina doctor` lists all)")
    return content


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


def _left_out(content: dict[str, Any]) -> list[str]:
    known = {image["id"] for image in content["images"]}
    ids = [a["image_id"] for a in content.get("annotations", []) if a["image_id"] not in known]
    if not ids:
        return []
    boxes = "1 box is" if len(ids) == 1 else f"{len(ids):,} boxes are"
    return [f"{boxes} left out, of an image that the file does not have (image_id {ids[0]!r})"]


def _missing(content: dict[str, Any], parts: tuple[dict[str, Any], ...]) -> list[str]:
    counts = [_counts(part) for part in parts]
    return [
        f"{side} has no box of the class '{category['name']}': try another --seed"
        for category in content["categories"]
        for side, count in zip(("train", "val"), counts)
        if count[category["id"]] == 0
    ]
