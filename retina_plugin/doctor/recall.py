"""The recall of ground truth by a config's anchors: by class, size and ratio."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from .anchors import AnchorGrid
from .findings import Finding, Severity
from .ground_truth import GroundTruth, training_sizes
from .matches import MatchedSample, iou_limits, low_quality_matches, match_sample

__all__ = [
    "AnchorFit",
    "Group",
    "Measured",
    "Unreached",
    "anchor_findings",
    "anchor_fit",
    "measure",
    "percent",
    "pixels",
]

# COCO's small, medium and large, as areas in pixels
_AREAS: dict[str, float] = {
    "small (< 32 px)": 0,
    "medium (32-96 px)": 32**2,
    "large (> 96 px)": 96**2,
}
# height over width
_RATIOS: dict[str, float] = {
    "h/w < 1/4": 0,
    "h/w 1/4 to 1/2": 1 / 4,
    "h/w 1/2 to 1": 1 / 2,
    "h/w 1 to 2": 1,
    "h/w 2 to 4": 2,
    "h/w > 4": 4,
}

_EXAMPLES = 5  # boxes on the page
_NAMED = 2  # boxes in a finding
_FEW_BOXES = 10  # of a class; a share of fewer says little
_MANY_MISSED = 0.1  # share of a class's boxes below the IoU of a positive anchor: worth a warning
_MANY_UNREACHED = 0.01  # share of all boxes that no anchor reaches: the same


@dataclass(frozen=True)
class Group:
    """Recall of some boxes: the shares that have an anchor of at least the lower and upper IoU."""

    name: str
    boxes: float  # mean over the training sizes: a box may be small at one and medium at another
    lower: float
    upper: float


@dataclass(frozen=True)
class Unreached:
    """A box that no anchor reaches, at none of the training sizes."""

    file: str
    label: str
    width: float  # pixels of the image
    height: float
    iou: float


@dataclass(frozen=True)
class AnchorFit:
    """The fit of a config's anchors to its training set. IoUs are the best of each box."""

    sizes: tuple[int, ...]  # INPUT.MIN_SIZE_TRAIN
    lower_iou: float  # below it an anchor is background
    upper_iou: float  # from it on an anchor is positive
    low_quality: str
    images: int
    dropped: int  # boxes that training does not see
    total: Group
    by_training_size: tuple[Group, ...]
    by_class: tuple[Group, ...]
    by_size: tuple[Group, ...]
    by_ratio: tuple[Group, ...]
    unreached: int
    unreached_first: tuple[Unreached, ...]
    sample: MatchedSample


@dataclass(frozen=True)
class Measured:
    """Best IoU and area of G boxes at T training sizes, in the network's frame."""

    iou_TG: np.ndarray
    area_TG: np.ndarray


def measure(grid: AnchorGrid, gt: GroundTruth, sizes: Sequence[int], max_size: int) -> Measured:
    """The best IoU of every box at every training size."""
    iou, area = [], []
    for size in sizes:
        boxes_G4, shapes_I2 = gt.resized(size, max_size)
        iou.append(grid.best_iou(boxes_G4, grid.map_shapes(shapes_I2)[gt.image_G]))
        area.append((boxes_G4[:, 2:] - boxes_G4[:, :2]).prod(axis=1))
    return Measured(np.stack(iou), np.stack(area))


def anchor_fit(
    cfg: CfgNode, grid: AnchorGrid, gt: GroundTruth, class_names: Sequence[str]
) -> AnchorFit:
    """Recall of the training set by a config's anchors.

    Boxes are resized as ``INPUT.MIN_SIZE_TRAIN`` and ``MAX_SIZE_TRAIN`` say; with several sizes,
    shares are means over them. Crops and flips are left out, and so is padding to the other images
    of a batch.

    Args:
        cfg: the config.
        grid: its anchors.
        gt: the training set's boxes; at least one.
        class_names: of the K classes.
    """
    sizes = training_sizes(cfg)
    lower, upper = iou_limits(cfg)
    measured = measure(grid, gt, sizes, cfg.INPUT.MAX_SIZE_TRAIN)
    iou_TG = measured.iou_TG
    is_lower, is_upper = iou_TG >= lower, iou_TG >= upper

    def group(name: str, of: Any) -> Group:
        low, up = is_lower[of], is_upper[of]
        share = (float(low.mean()), float(up.mean())) if low.size else (0.0, 0.0)
        return Group(name, low.size / len(sizes), *share)

    sides_G2 = gt.boxes_G4[:, 2:] - gt.boxes_G4[:, :2]
    ratio_TG = np.broadcast_to(sides_G2[:, 1] / sides_G2[:, 0], iou_TG.shape)
    of_class = np.argsort(gt.classes_G, kind="stable")
    ends = np.searchsorted(gt.classes_G[of_class], range(len(class_names) + 1))
    everywhere = np.arange(len(sizes))[:, None]
    unreached = np.flatnonzero(~is_lower.any(axis=0))
    return AnchorFit(
        sizes=tuple(sizes),
        lower_iou=lower,
        upper_iou=upper,
        low_quality=low_quality_matches(cfg),
        images=len(gt.files),
        dropped=gt.num_dropped,
        total=group("all", slice(None)),
        by_training_size=tuple(
            Group(pixels([size]), iou_TG.shape[1], float(low.mean()), float(up.mean()))
            for size, low, up in zip(sizes, is_lower, is_upper)
        ),
        by_class=tuple(
            group(name, (everywhere, of_class[None, start:end]))
            for name, (start, end) in zip(class_names, itertools.pairwise(ends))
        ),
        by_size=_binned(group, _AREAS, measured.area_TG),
        by_ratio=_binned(group, _RATIOS, ratio_TG),
        unreached=len(unreached),
        unreached_first=tuple(
            Unreached(
                gt.files[gt.image_G[g]],
                _name(class_names, int(gt.classes_G[g])),
                float(sides_G2[g, 0]),
                float(sides_G2[g, 1]),
                float(iou_TG[:, g].max()),
            )
            for g in unreached[:_EXAMPLES]
        ),
        sample=match_sample(cfg, grid, gt, len(class_names)),
    )


def _binned(
    group: Callable[[str, np.ndarray], Group], starts: dict[str, float], values_TG: np.ndarray
) -> tuple[Group, ...]:
    index = np.digitize(values_TG, list(starts.values())) - 1
    return tuple(group(name, index == i) for i, name in enumerate(starts))


def _name(class_names: Sequence[str], index: int) -> str:
    return class_names[index] if 0 <= index < len(class_names) else str(index)


def anchor_findings(fit: AnchorFit) -> Iterator[Finding]:
    """What a fit says to a person."""
    key, missed = "MODEL.ANCHOR_GENERATOR", 1 - fit.total.upper
    at = f"at INPUT.MIN_SIZE_TRAIN {pixels(fit.sizes)}"
    yield Finding(
        Severity.WARNING if missed > _MANY_MISSED else Severity.NOTE,
        key,
        f"{percent(fit.total.upper)} of {fit.total.boxes:,.0f} boxes have an anchor with IoU >= "
        f"{fit.upper_iou:g} (positive), {percent(fit.total.lower)} one with >= "
        f"{fit.lower_iou:g} (not background), {at}",
    )
    if fit.unreached:
        yield Finding(
            Severity.WARNING
            if fit.unreached > _MANY_UNREACHED * fit.total.boxes
            else Severity.NOTE,
            key,
            f"{fit.unreached:,} boxes ({percent(fit.unreached / fit.total.boxes)}) have no anchor "
            f"with IoU >= {fit.lower_iou:g} {at}; the first: "
            + "; ".join(
                f"{box.file}: '{box.label}', {box.width:.4g} x {box.height:.4g} px, "
                f"IoU {int(box.iou * 1000) / 1000:g}"
                for box in fit.unreached_first[:_NAMED]
            ),
            _RESCUE[fit.low_quality],
        )
    sample = fit.sample
    if not sum(sample.positives.values()):
        yield Finding(
            Severity.ERROR,
            key,
            f"no anchor is positive in {sample.images} images with {sample.boxes:,} boxes {at}: "
            "there is nothing to learn",
            "take other sizes and ratios, or larger images",
        )
    elif sample.boxes_without:
        share = sample.boxes_without / sample.boxes
        yield Finding(
            Severity.WARNING if share > _MANY_MISSED else Severity.NOTE,
            "MODEL.RETINANET.LOW_QUALITY_MATCHES",
            f"{percent(share)} of {sample.boxes:,} boxes in {sample.images} images get no "
            f"positive anchor with {fit.low_quality}",
            "no anchor learns them" if fit.low_quality == "always" else _MORE_MATCHES,
        )
    unused = [name for name, count in sample.positives.items() if not count]
    if unused and sum(sample.positives.values()):
        yield Finding(
            Severity.NOTE,
            key,
            f"no positive anchor in {sample.images} images on {', '.join(unused)}: the boxes have "
            "other sizes",
        )


_RESCUE = {
    "always": "MODEL.RETINANET.LOW_QUALITY_MATCHES always makes the nearest anchors of such a box "
    "positive all the same, unless they overlap another box more",
    "above_background": "they train no anchor, because MODEL.RETINANET.LOW_QUALITY_MATCHES "
    "above_background asks for this IoU; always would make their nearest anchors positive",
    "never": "they train no anchor; MODEL.RETINANET.LOW_QUALITY_MATCHES always would make their "
    "nearest anchors positive",
}
_MORE_MATCHES = "always makes the nearest anchors of every box positive"


def pixels(sizes: Sequence[int]) -> str:
    """ "800 px", or "640 to 800 px" for several."""
    low, high = min(sizes), max(sizes)
    if low == 0:
        return "0 (not resized)" if high == 0 else f"0 (not resized) to {high} px"
    return f"{low} px" if low == high else f"{low} to {high} px"


def percent(share: float) -> str:
    """A share with one digit after the point; "100 %" means all and "0 %" none."""
    text = f"{100 * share:.1f} %"
    if text == "100.0 %":
        return "100 %" if share == 1 else "> 99.9 %"
    if text == "0.0 %":
        return "0 %" if share == 0 else "< 0.1 %"
    return text
