"""Every image of the datasets, read as training and evaluation read it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode

from retina_plugin.data.images import BadImageError, check_image_size, read_image
from retina_plugin.errors import ConfigError

from .datasets import dataset_records
from .findings import Finding, Severity

__all__ = ["check_images"]

_CHUNK = 32  # images that a process gets at a time


def check_images(
    cfg: CfgNode,
    *,
    splits: Sequence[str] = ("TRAIN", "TEST"),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Finding]:
    """Images that are missing, truncated, damaged, of a wrong mode, or of another size.

    Each image of the datasets is decoded once, by ``DATALOADER.NUM_WORKERS`` processes, exactly as
    a training would read it.

    Args:
        splits: of ``DATASETS``.
        progress: called with the images that are done and with all.

    Example::

        findings = list(check_images(cfg, progress=lambda done, total: print(done, total)))
    """
    skip = cfg.DATALOADER.ON_BAD_IMAGE == "skip"
    names = {
        name: split
        for split in ("TRAIN", "TEST")
        if split in splits
        for name in cfg.DATASETS[split]
    }  # TEST wins: there a bad image is an error
    records: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        try:
            loaded = dataset_records(name)
            if isinstance(loaded, list):  # it may also be a dataset of PyTorch, even an endless one
                records += [(name, record) for record in loaded]
        except ConfigError as error:
            yield Finding(Severity.ERROR, name, str(error).removeprefix(f"{name}: "))
    wanted = [_wanted(record) for _, record in records]
    results = _read_all(wanted, cfg.INPUT.FORMAT, cfg.DATALOADER.NUM_WORKERS)
    for done, ((name, _), problem) in enumerate(zip(records, results), 1):
        if problem:
            skipped = skip and names[name] == "TRAIN"
            yield Finding(Severity.WARNING if skipped else Severity.ERROR, name, problem)
        if progress is not None:
            progress(done, len(records))


def _wanted(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("file_name", "width", "height") if key in record}


def _read_all(records: list[dict[str, Any]], image_format: str, workers: int) -> Iterator[str]:
    """What is wrong with the image of each record, in order; "" if nothing is."""
    if workers < 1:
        yield from (_problem(record, image_format) for record in records)
        return
    chunks = [records[i : i + _CHUNK] for i in range(0, len(records), _CHUNK)]
    context = multiprocessing.get_context("fork")  # what PyTorch's loader does
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        formats = [image_format] * len(chunks)
        for problems in pool.map(_problems, chunks, formats):
            yield from problems


def _problems(records: list[dict[str, Any]], image_format: str) -> list[str]:
    return [_problem(record, image_format) for record in records]


def _problem(record: dict[str, Any], image_format: str) -> str:
    try:
        check_image_size(dict(record), read_image(record["file_name"], image_format))
    except BadImageError as error:
        return str(error)
    except KeyError:
        return "a record has no file_name"
    return ""
