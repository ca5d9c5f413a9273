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
from .datasets import check_datasets, dataset_records, known_classes
from .findings import Finding, Severity, raise_errors
from .images import check_images
from .learning import StepCost
from .machine import (
    check_batch_size,
    check_compiler,
    check_precision,
    check_tracking,
    device_type,
)
from .page import write_report
from .report import Check, Report, examine_training
from .weights import check_weights

__all__ = [
    "Finding",
    "Report",
    "Severity",
    "StepCost",
    "check_batch_size",
    "check_images",
    "check_weights",
    "dataset_records",
    "examine_training",
    "known_classes",
    "named_quick_checks",
    "quick_checks",
    "raise_errors",
    "write_report",
]


def named_quick_checks(cfg: CfgNode, *, eval_only: bool = False) -> dict[str, Check]:
    """The checks of :func:`quick_checks` by name, so that each can be run by itself."""

    def machine() -> Iterator[Finding]:
        yield from check_precision(cfg, eval_only)
        if cfg.MODEL.COMPILE:
            yield from check_compiler(device_type(cfg))
        if not eval_only:
            yield from check_tracking(cfg)

    splits = ("TEST",) if eval_only else ("TRAIN", "TEST")
    return {
        "keys": lambda: check_config(cfg, eval_only),
        "datasets": lambda: check_datasets(cfg, splits),
        "machine": machine,
    }


def quick_checks(cfg: CfgNode, *, eval_only: bool = False) -> Iterator[Finding]:
    """The findings of every check that reads no pixels: keys, datasets, annotations, machine.

    Seconds for COCO, most of which is reading the annotation files.

    Args:
        eval_only: what matters for an evaluation of ``DATASETS.TEST`` only.
    """
    for check in named_quick_checks(cfg, eval_only=eval_only).values():
        yield from check()
