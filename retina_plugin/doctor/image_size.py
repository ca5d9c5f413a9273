"""The image size at which a class that the anchors miss would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode

from .anchors import AnchorGrid
from .findings import Finding, Severity
from .ground_truth import GroundTruth, resized_shapes
from .recall import AnchorFit, measure, percent, pixels

__all__ = ["scaled_sizes", "size_findings", "size_setting", "spread"]

_FEW_BOXES = 10  # of a class; a share of fewer says little
_MANY_MISSED = 0.1  # share of a class's boxes below the IoU of a positive anchor: worth a warning
_CLASSES = 5  # that get a finding of their own
_FACTORS = (1.5, 2, 3, 4, 0.75, 0.5)  # of the image size
_SOLVED = 0.01  # a share of missed boxes that no larger size has to improve
_OTHER_ANCHORS = "take other MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS"
_BOXES = 20_000  # of a class, for another image size: more would change no digit


def size_findings(
    cfg: CfgNode, grid: AnchorGrid, gt: GroundTruth, fit: AnchorFit, class_names: Sequence[str]
) -> Iterator[Finding]:
    """Classes of which many boxes have no positive anchor, and the image size that gives them one.

    Sizes up to four times the config's and down to half are tried.
    """
    missed = [
        (1 - group.upper, index)
        for index, group in enumerate(fit.by_class)
        if group.boxes >= _FEW_BOXES and 1 - group.upper > _MANY_MISSED
    ]
    missed.sort(reverse=True)
    key = "INPUT.MIN_SIZE_TRAIN"
    for share, index in missed[:_CLASSES]:
        group = fit.by_class[index]
        text = (
            f"class '{class_names[index]}': {percent(share)} of its {group.boxes:,.0f} boxes lie "
            f"below IoU {fit.upper_iou:g} at {pixels(fit.sizes)}"
        )
        if 0 in fit.sizes:  # 0: not resized
            yield Finding(Severity.WARNING, key, text, f"resize the images, or {_OTHER_ANCHORS}")
            continue
        sizes, max_size, other = _best_size(
            cfg, grid, gt, fit, np.flatnonzero(gt.classes_G == index)
        )
        at = f"{percent(other)} at {pixels(sizes)}"
        if other <= share / 2:
            limit = f" INPUT.MAX_SIZE_TRAIN {max_size}" * (max_size != cfg.INPUT.MAX_SIZE_TRAIN)
            fix = (
                f'set INPUT.MIN_SIZE_TRAIN "{size_setting(cfg, sizes)}"{limit} and the same for '
                f"the test ({(sizes[0] / fit.sizes[0]) ** 2:.2g} times the pixels), or take other "
                "anchors"
            )
            yield Finding(Severity.WARNING, key, f"{text}, and {at}", fix)
        else:
            yield Finding(
                Severity.WARNING,
                key,
                f"{text}, and still {at}",
                f"another size does not help: {_OTHER_ANCHORS}",
            )
    if missed[_CLASSES:]:
        names = ", ".join(class_names[index] for _, index in missed[_CLASSES:])
        yield Finding(
            Severity.WARNING,
            key,
            f"more than {percent(_MANY_MISSED)} of the boxes of {len(missed) - _CLASSES} more "
            f"classes lie below IoU {fit.upper_iou:g}: {names}",
        )


def _best_size(
    cfg: CfgNode, grid: AnchorGrid, gt: GroundTruth, fit: AnchorFit, index: np.ndarray
) -> tuple[list[int], int, float]:
    """Training sizes, MAX_SIZE_TRAIN and the share of boxes below the upper IoU there."""
    some = gt.take(spread(index, _BOXES))
    best: tuple[list[int], int, float] | None = None
    for factor in _FACTORS:
        sizes, max_size = scaled_sizes(cfg, gt, fit.sizes, factor)
        share = float((measure(grid, some, sizes, max_size).iou_TG < fit.upper_iou).mean())
        if best is None or share < best[2]:
            best = sizes, max_size, share
        if share <= _SOLVED:
            break
    assert best is not None
    return best


def size_setting(cfg: CfgNode, sizes: Sequence[int]) -> tuple[int, ...]:
    """The value of ``INPUT.MIN_SIZE_TRAIN`` for these training sizes."""
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return min(sizes), max(sizes)
    return tuple(sizes)


def scaled_sizes(
    cfg: CfgNode, gt: GroundTruth, sizes: Sequence[int], factor: float
) -> tuple[list[int], int]:
    """Other training sizes, and a MAX_SIZE_TRAIN that does not undo them."""
    scaled, limit = [round(size * factor) for size in sizes], cfg.INPUT.MAX_SIZE_TRAIN
    longest = max(resized_shapes(gt.shapes_I2, size, 1 << 30).max() for size in scaled)
    return scaled, max(limit, min(round(limit * factor), int(longest)))


def spread(index: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread."""
    if len(index) <= most:
        return index
    return index[np.linspace(0, len(index) - 1, most).round().astype(np.int64)]
