"""Checks of a config, its datasets, its weights and the machine, before anything is built.

A check is a function that yields :class:`Finding` objects. :func:`quick_checks` runs all that read
no pixels, :func:`check_images` reads every image.

    for finding in quick_checks(cfg):
        print(finding.severity, finding)
"""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from .config import check_config
from .datasets import check_datasets, dataset_records
from .findings import Finding, Severity, raise_errors
from .images import check_images
from .machine import check_compiler, check_precision, device_type

__all__ = [
    "Finding",
    "Severity",
    "check_images",
    "dataset_records",
    "quick_checks",
    "raise_errors",
]


def quick_checks(cfg: CfgNode, *, eval_only: bool = False) -> Iterator[Finding]:
    """The findings of every check that reads no pixels: keys, datasets, annotations, machine.

    Seconds for COCO, most of which is reading the annotation files.

    Args:
        eval_only: what matters for an evaluation of ``DATASETS.TEST`` only.
    """
    yield from check_config(cfg, eval_only)
    yield from check_datasets(cfg, ("TEST",) if eval_only else ("TRAIN", "TEST"))
    yield from check_precision(cfg, eval_only)
    if cfg.MODEL.COMPILE:
        yield from check_compiler(device_type(cfg))
