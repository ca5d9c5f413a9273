"""The datasets that a config names: registered, with their files, classes and annotations."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import stat
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_plugin.data.formats import FORMATS, parse, register_datasets, unknown_dataset
from retina_plugin.errors import ConfigError

from .annotations import check_annotations
from .findings import Finding, Severity
from .reading import category_names, image_files, read_annotations
from .records import check_records
from .tally import Kind, Tally

__all__ = ["check_datasets", "check_num_classes", "dataset_records", "known_classes"]

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

_COCO_LAYOUT = (
    "coco/annotations/instances_{train,val}2017.json and coco/{train,val}2017/ "
    "(for test-dev also coco/annotations/image_info_test-dev2017.json and coco/test2017/)"
)
# Where functions come from that give what Detectron2 reads from the annotation file.
_COCO_LOADERS = (
    "detectron2.data.datasets.coco",
    "retina_plugin.data.digits",
    "retina_plugin.data.formats.catalog",
)

_FIX_IMAGE = "put them in place, or remove them from the annotations"
_EMPTY_IMAGE = Kind(_ERROR, "image files of 0 bytes", _FIX_IMAGE)


def dataset_records(name: str) -> list[dict[str, Any]]:
    """What the function of a registered dataset returns: a record an image.

    Raises:
        ConfigError: no dataset has that name, or its function fails; the line has the place.
    """
    register_datasets([name])
    if name not in DatasetCatalog:
        raise ConfigError(unknown_dataset(name))
    try:
        return DatasetCatalog.get(name)
    except ConfigError:
        raise
    except Exception as error:  # the function is the user's
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
        what = " ".join(str(error).split())
        raise ConfigError(
            f"{name}: its function fails: {type(error).__name__}: {what} ({place})"
        ) from error


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> Iterator[Finding]:
    """The datasets of ``DATASETS.TRAIN`` and ``DATASETS.TEST``: files, annotations, classes.

    Each annotation file is read once, and no image. Writes the embedded dataset if it is named and
    not there yet.
    """
    keys: dict[str, list[str]] = {}  # of a dataset, the splits that name it
    for split in splits:
        names = cfg.DATASETS[split]
        if not names and (split == "TRAIN" or len(splits) == 1):
            yield Finding(
                _ERROR,
                f"DATASETS.{split}",
                f'is empty: name a registered dataset, e.g. ("coco_2017_{split.lower()}",) or '
                f'("digits_scenes_{split.lower()}",)'.replace("_test", "_val"),
            )
        for name in names:
            keys.setdefault(name, []).append(split)
    classes: dict[str, list[str]] = {}
    for name, roles in keys.items():
        missing = list(_check_files(f"DATASETS.{roles[0]}", name))
        yield from missing
        if not missing:
            found, classes[name] = _check_content(cfg, name, roles)
            yield from found
    yield from _check_num_classes(cfg, {name: c for name, c in classes.items() if c})
    yield from _check_class_order(cfg, splits, classes)


def _check_files(key: str, name: str) -> Iterator[Finding]:
    register_datasets([name])
    if name not in DatasetCatalog:
        yield Finding(
            _ERROR,
            key,
            unknown_dataset(name),
            f"name yours by its format and path, {', '.join(FORMATS.values())} (see "
            "docs/datasets.md), or register it from a module of IMPORTS",
        )
        return
    metadata = MetadataCatalog.get(name)
    prepare = metadata.get("prepare")
    if prepare is not None:
        try:
            prepare()
        except ModuleNotFoundError as error:  # an extra is not installed; the message says which
            yield Finding(_ERROR, key, f"{name}: {error}")
            return
        except ConfigError as error:  # data of another format that cannot be read
            yield Finding(_ERROR, key, str(error))
            return
    for attribute in ("json_file", "image_root"):
        path = os.fspath(metadata.get(attribute) or "")
        if not path or "://" in path or os.path.exists(path):  # "": the names are whole paths
            continue
        if name.startswith("coco_"):
            root = os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
            fix = (
                f"put COCO under {root} as {_COCO_LAYOUT}, or set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds coco/"
            )
        elif parse(name):
            fix = "paths are relative to the folder that the command runs in"
        else:
            fix = f"check the {attribute} with which the dataset was registered"
        yield Finding(_ERROR, key, f"{name} has no {attribute} at {path}", fix)


def _check_content(cfg: CfgNode, name: str, roles: list[str]) -> tuple[list[Finding], list[str]]:
    """What is wrong with annotations, records and image files; and the class names, if known."""
    metadata = MetadataCatalog.get(name)
    train, test = "TRAIN" in roles, "TEST" in roles
    classes = list(metadata.get("thing_classes") or [])
    found: list[Finding] = []
    json_file = metadata.get("json_file")
    json_file = None if json_file is None else os.fspath(json_file)
    by_detectron2 = DatasetCatalog[name].__module__ in _COCO_LOADERS
    # A function of its own may read another format; COCO's evaluation reads the file all the same.
    read = by_detectron2 or (test and _reads_coco(cfg))
    if read and json_file is not None and "://" not in json_file:
        try:
            with _no_garbage_collection():
                content = read_annotations(json_file)
                found += check_annotations(
                    json_file,
                    content,
                    train=train and by_detectron2,
                    test=test,
                    all_keys=by_detectron2,
                )
        except ConfigError as error:
            what = str(error).removeprefix(f"{json_file}: ")
            return [Finding(_ERROR, json_file, what)], classes
        names = category_names(content)
        if by_detectron2:
            if classes and names and classes != names:
                found.append(_difference(_ERROR, json_file, names, name, classes))
            classes = names or classes
            if train:
                found += _check_boxes_left(cfg, json_file, content.get("annotations"))
            root = metadata.get("image_root") or ""
            files = [os.path.join(root, file) for file in image_files(content)]
            found += _check_image_files(cfg, name, files, test)
    if not by_detectron2:
        try:
            records = dataset_records(name)
        except ConfigError as error:
            return [*found, Finding(_ERROR, name, str(error).removeprefix(f"{name}: "))], classes
        if isinstance(records, list):  # it may also be a dataset of PyTorch
            classes = list(MetadataCatalog.get(name).get("thing_classes") or classes)
            count = len(classes) or cfg.MODEL.RETINANET.NUM_CLASSES
            found += check_records(name, records, count, train=train, test=test)
            files = [r["file_name"] for r in records if isinstance(r, dict) and "file_name" in r]
            found += _check_image_files(cfg, name, files, test)
            if train:
                lists = [r.get("annotations") for r in records if isinstance(r, dict)]
                flat = [
                    a for annotations in lists if isinstance(annotations, list) for a in annotations
                ]
                found += _check_boxes_left(cfg, name, flat)
        if test and json_file is None and not classes and _reads_coco(cfg):
            fix = f"MetadataCatalog.get('{name}').thing_classes = [...]"
            found.append(Finding(_ERROR, name, "has no class names, which COCO's AP needs", fix))
    return found, classes


def _reads_coco(cfg: CfgNode) -> bool:
    """Whether an evaluator reads COCO's format: by its name, as users write their own."""
    return any("COCO" in name for name in cfg.TEST.EVALUATORS)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Half the time, where millions of objects are made that no cycle holds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_boxes_left(cfg: CfgNode, where: str, annotations: Any) -> Iterator[Finding]:
    """There is something to learn."""
    if not isinstance(annotations, list) or not annotations:
        return  # said already
    if all(isinstance(a, dict) and a.get("iscrowd", 0) for a in annotations):
        yield Finding(_ERROR, where, "has crowd boxes only, from which nothing is learned")


def _check_image_files(cfg: CfgNode, name: str, files: list[str], test: bool) -> Iterator[Finding]:
    """The files are there. They are opened by :func:`~retina_plugin.doctor.check_images` only."""
    skipped = not test and cfg.DATALOADER.ON_BAD_IMAGE == "skip"
    severity = _WARNING if skipped else _ERROR
    missing = Kind(severity, "image files are missing", _FIX_IMAGE)
    empty, no_file = _EMPTY_IMAGE._replace(severity=severity), Kind(severity, "folders for images")
    tally = Tally(name)
    for file in files:
        if "://" in str(file):
            continue
        try:
            status = os.stat(file)
        except (OSError, ValueError, TypeError):  # TypeError: a name that is None
            tally.add(missing, str(file))
            continue
        if status.st_size == 0:
            tally.add(empty, file)
        elif stat.S_ISDIR(status.st_mode):
            tally.add(no_file, file)
    yield from tally.findings(len(files))


def check_num_classes(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> Iterator[Finding]:
    """``MODEL.RETINANET.NUM_CLASSES`` is the number of classes of every dataset of ``splits``.

    A dataset whose classes are not known passes. Some know them only once they are loaded.
    """
    names = [name for split in splits for name in cfg.DATASETS[split]]
    known = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    return _check_num_classes(cfg, {name: c for name, c in known.items() if c is not None})


def _check_num_classes(cfg: CfgNode, classes: dict[str, list[str]]) -> Iterator[Finding]:
    expected = cfg.MODEL.RETINANET.NUM_CLASSES
    # one finding for all datasets with the same number
    first = {len(names): name for name, names in reversed(classes.items())}
    for name, names in classes.items():
        if len(names) != expected and first[len(names)] == name:
            yield Finding(
                _ERROR,
                "MODEL.RETINANET.NUM_CLASSES",
                f"is {expected}, but {name} has {len(names)} classes",
                f"set MODEL.RETINANET.NUM_CLASSES {len(names)} "
                "(MODEL.ROI_HEADS.NUM_CLASSES has no effect on RetinaNet)",
            )


def _check_class_order(
    cfg: CfgNode, splits: Sequence[str], classes: dict[str, list[str]]
) -> Iterator[Finding]:
    """Every dataset numbers the same classes in the same order."""
    known = {name: names for name, names in classes.items() if names}
    if "TRAIN" not in splits:
        # An evaluation does not need the training set. Where it is known and has the same classes
        # in another order, the weights do not fit the numbers of the test set.
        for name in cfg.DATASETS.TRAIN:
            names = known_classes(name)
            for other, tested in known.items():
                if names != tested and sorted(names) == sorted(tested):
                    yield _difference(_ERROR, other, tested, name, names)
    reference = next(iter(known), None)
    for name, names in known.items():
        if reference is None or len(names) != len(known[reference]) or names == known[reference]:
            continue
        same = [_plain(a) == _plain(b) for a, b in zip(names, known[reference])]
        # A single class cannot be taken for another one. Detectron2 refuses to train on several
        # sets unless their names are equal.
        harmless = all(same) or len(names) == 1
        both = {name, reference} <= {*cfg.DATASETS.TRAIN} and "TRAIN" in splits
        severity = _WARNING if harmless and not both else _ERROR
        yield _difference(severity, name, names, reference, known[reference])


def known_classes(name: str) -> list[str]:
    """The class names of a dataset, from its metadata or its annotation file; [] if not known."""
    if name not in DatasetCatalog:
        return []
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes"):
        return list(metadata.thing_classes)
    try:
        return category_names(read_annotations(metadata.get("json_file", "")))
    except ConfigError:
        return []


def _plain(name: str) -> str:
    """Without what does not make it another class: case, spaces, hyphens."""
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _difference(
    severity: Severity, name: str, names: list[str], other: str, others: list[str]
) -> Finding:
    pairs = zip(names, others)
    first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(names), len(others)))
    a, b = (x[first] if first < len(x) else "none" for x in (names, others))
    return Finding(
        severity,
        name,
        f"class {first} is '{a}', but '{b}' in {other} (classes are numbered by category id)",
        "give both the same categories with the same ids",
    )
