"""Anchors that fit a training set better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from .anchors import AnchorGrid
from .findings import Finding, Severity
from .ground_truth import GroundTruth
from .image_size import scaled_sizes, size_setting, spread
from .recall import AnchorFit, Group, measure, percent, pixels

__all__ = ["AnchorSuggestion", "suggest_anchors", "suggestion_findings"]

_SAMPLE = 2000  # boxes that the search looks at
_STEPS = (1.3, 1.15, 1.07, 1.03)  # factors of the coordinate search
_EVALUATIONS = 200  # of a start
_GAIN = 0.02  # of recall: less is not worth new anchors
_CLEAR_GAIN = 0.05  # a warning instead of a note; what more anchors or pixels have to bring
_ENOUGH = 0.9  # recall that asks neither for more anchors at a location nor for larger images
_FACTORS = (2, 4)  # of the image size, where no anchors are enough
_MAX_RATIO = 20.0  # of a suggested anchor's sides
_MAX_SIZE = 1.5  # of a suggested anchor, in sizes of the largest box


@dataclass(frozen=True)
class AnchorSuggestion:
    """Anchors with a better recall of the training set.

    Args:
        sizes: of each level.
        ratios: height over width, for all levels.
        anchors, anchors_now: anchors at a location, suggested and of the config.
        min_sizes, max_size: ``INPUT.MIN_SIZE_TRAIN`` and ``MAX_SIZE_TRAIN`` that they are for.
        resizes: whether those are not the config's.
        now, then: recall by the config's anchors and by these.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    anchors: int
    anchors_now: int
    min_sizes: tuple[int, ...]
    max_size: int
    resizes: bool
    now: Group
    then: Group

    def yaml(self) -> str:
        """Lines to paste into a config."""
        sizes = "".join(f"      - {list(level)}\n" for level in self.sizes)
        lines = (
            f"MODEL:\n  ANCHOR_GENERATOR:\n    SIZES:\n{sizes}"
            f"    ASPECT_RATIOS: [{list(self.ratios)}]\n"
        )
        if self.resizes:
            lines += (
                f"INPUT:\n  MIN_SIZE_TRAIN: {list(self.min_sizes)}\n"
                f"  MAX_SIZE_TRAIN: {self.max_size}\n"
                f"  MIN_SIZE_TEST: {max(self.min_sizes)}\n  MAX_SIZE_TEST: {self.max_size}\n"
            )
        return lines


def suggest_anchors(
    cfg: CfgNode, grid: AnchorGrid, gt: GroundTruth, fit: AnchorFit, *, resize: bool = True
) -> AnchorSuggestion | None:
    """Anchors that raise the recall by at least 2 percentage points; None if none were found.

    Sizes form a geometric series over the levels, as the paper's do; all levels share the ratios.
    The search starts with the config's anchors and with ones made from the boxes (the quantiles of
    their sizes, k-means of their ratios with IoU as the distance), and changes one number at a time
    while the recall of a sample grows. The result is measured on all boxes.

    The number of anchors at a location and the size of the images stay, unless they are plainly not
    enough; the size stays in any case without ``resize``. A generator other than Detectron2's
    default has no such sizes and ratios: None.
    """
    if not isinstance(grid.generator, DefaultAnchorGenerator):
        return None
    if min(fit.total.lower, fit.total.upper) > 1 - _GAIN:
        return None
    octave, ratios = _shape_of(grid)
    sizes, max_size = list(fit.sizes), cfg.INPUT.MAX_SIZE_TRAIN
    search = _Search(grid, gt, sizes, max_size, fit)
    found = search.best(octave, len(ratios), ratios)
    recall = search.recall(found)
    for more in ((octave + 1, len(ratios)), (octave, len(ratios) + 2)):
        if recall < _ENOUGH:
            other = search.best(*more, ratios)
            if search.recall(other) > recall + _CLEAR_GAIN:
                found, recall = other, search.recall(other)
    for factor in _FACTORS if resize else ():
        if recall < _ENOUGH and 0 not in fit.sizes:  # 0: not resized
            other_sizes, other_max = scaled_sizes(cfg, gt, fit.sizes, factor)
            other_search = _Search(grid, gt, other_sizes, other_max, fit)
            other = other_search.best(octave, len(ratios), ratios)
            if other_search.recall(other) > recall + _CLEAR_GAIN:
                search, found, recall = other_search, other, other_search.recall(other)
                sizes, max_size = other_sizes, other_max
    iou = measure(search.grid_of(found), gt, sizes, max_size).iou_TG
    then = Group(
        "all",
        fit.total.boxes,
        float((iou >= fit.lower_iou).mean()),
        float((iou >= fit.upper_iou).mean()),
    )
    gain = max(then.upper - fit.total.upper, then.lower - fit.total.lower)
    if gain < _GAIN or then.upper < fit.total.upper:
        return None
    return AnchorSuggestion(
        sizes=found.sizes(len(grid.names)),
        ratios=found.rounded_ratios(),
        anchors=found.octave * len(found.rounded_ratios()),
        anchors_now=grid.num_cell_anchors,
        min_sizes=size_setting(cfg, sizes),
        max_size=max_size,
        resizes=tuple(sizes) != fit.sizes,
        now=fit.total,
        then=then,
    )


def suggestion_findings(suggestion: AnchorSuggestion, fit: AnchorFit) -> Iterator[Finding]:
    """A suggestion as a finding."""
    now, then = suggestion.now, suggestion.then
    same = suggestion.anchors == suggestion.anchors_now
    clear = then.upper - now.upper >= _CLEAR_GAIN or then.lower - now.lower >= _CLEAR_GAIN
    anchors = f"the same {suggestion.anchors} anchors at a location"
    if not same:
        anchors = f"{suggestion.anchors} anchors at a location for {suggestion.anchors_now}"
    if suggestion.resizes:
        anchors += f", and images of {pixels(suggestion.min_sizes)}"
    yield Finding(
        Severity.WARNING if clear else Severity.NOTE,
        "MODEL.ANCHOR_GENERATOR",
        f"other anchors raise the share of boxes with IoU >= {fit.upper_iou:g} from "
        f"{percent(now.upper)} to {percent(then.upper)}, with IoU >= {fit.lower_iou:g} from "
        f"{percent(now.lower)} to {percent(then.lower)}, with {anchors}",
        "paste the suggested YAML lines and train the head anew"
        + ("" if same else " (its last convs change their shape)"),
    )


@dataclass(frozen=True)
class _Anchors:
    """``octave`` sizes a level, from ``first`` on, ``factor`` times as large a level higher."""

    first: float
    factor: float
    octave: int
    ratios: tuple[float, ...]

    def sizes(self, levels: int) -> tuple[tuple[float, ...], ...]:
        steps = [[level + j / self.octave for j in range(self.octave)] for level in range(levels)]
        return tuple(
            tuple(round(self.first * self.factor**step, 1) for step in level) for level in steps
        )

    def largest(self, levels: int) -> float:
        return self.first * self.factor ** (levels - 1 / self.octave)

    def rounded_ratios(self) -> tuple[float, ...]:
        """Each once: boxes of one shape may draw several to the same."""
        return tuple(sorted({float(f"{ratio:.2g}") for ratio in self.ratios}))

    def changed(self, number: int, by: float) -> _Anchors:
        """With one number multiplied; unchanged if it would leave its range."""
        if number == 0:
            return replace(self, first=max(self.first * by, 1.0))
        if number == 1:
            return replace(self, factor=min(max(self.factor * by, 1.05), 4.0))
        i = number - 2
        ratio = min(max(self.ratios[i] * by, 1 / _MAX_RATIO), _MAX_RATIO)
        return replace(self, ratios=(*self.ratios[:i], ratio, *self.ratios[i + 1 :]))


def _shape_of(grid: AnchorGrid) -> tuple[int, tuple[float, ...]]:
    """How many sizes a level has, and the ratios of the anchors of the first level."""
    sides_A2 = grid.cells[0][:, 2:] - grid.cells[0][:, :2]
    ratios = tuple(sorted({float(f"{h / w:.4g}") for w, h in sides_A2}))
    return max(1, len(sides_A2) // len(ratios)), ratios


class _Search:
    """Coordinate search for anchors on a sample of boxes, each at one of the training sizes."""

    def __init__(
        self, grid: AnchorGrid, gt: GroundTruth, sizes: Sequence[int], max_size: int, fit: AnchorFit
    ) -> None:
        self.grid, self.fit = grid, fit
        generator: Any = grid.generator
        self.offset = float(generator.offset)
        index = spread(np.arange(len(gt.boxes_G4)), _SAMPLE)
        boxes, maps = [], []
        for turn, size in enumerate(sizes):
            some = gt.take(index[turn :: len(sizes)])
            boxes_G4, shapes_I2 = some.resized(size, max_size)
            boxes.append(boxes_G4)
            maps.append(grid.map_shapes(shapes_I2)[some.image_G])
        self.boxes_G4, self.map_shapes_GL2 = np.concatenate(boxes), np.concatenate(maps)
        self.sides_G2 = self.boxes_G4[:, 2:] - self.boxes_G4[:, :2]

    def grid_of(self, anchors: _Anchors) -> AnchorGrid:
        grid = self.grid
        generator = DefaultAnchorGenerator(
            sizes=anchors.sizes(len(grid.names)),
            aspect_ratios=[anchors.rounded_ratios()],
            strides=grid.strides,
            offset=self.offset,
        )
        return AnchorGrid.from_generator(
            generator, grid.names, grid.strides, grid.divisibility, grid.square
        )

    def _iou(self, anchors: _Anchors) -> np.ndarray:
        """Without building the generator, which would take most of the time."""
        ratios = np.sqrt(anchors.rounded_ratios())
        cells = []
        for sizes, stride in zip(anchors.sizes(len(self.grid.names)), self.grid.strides):
            sides_SR2 = np.multiply.outer(sizes, np.stack([1 / ratios, ratios], axis=1))
            half_A2 = sides_SR2.reshape(-1, 2) / 2
            centre = self.offset * stride
            cells.append(np.concatenate([centre - half_A2, centre + half_A2], axis=1))
        grid = replace(self.grid, cells=tuple(cells))
        return grid.best_iou(self.boxes_G4, self.map_shapes_GL2)

    def recall(self, anchors: _Anchors) -> float:
        return float((self._iou(anchors) >= self.fit.upper_iou).mean())

    def _score(self, anchors: _Anchors) -> float:
        """Recall at the upper IoU first; the rest shows the way where that is flat."""
        iou, upper, lower = self._iou(anchors), self.fit.upper_iou, self.fit.lower_iou
        recall = (iou >= upper).mean() + 0.3 * (iou >= lower).mean()
        return float(recall + 0.1 * iou.clip(max=upper).mean())

    def best(self, octave: int, num_ratios: int, ratios: tuple[float, ...]) -> _Anchors:
        """The best anchors of this many sizes and ratios; ``ratios`` are the config's."""
        lengths = np.sqrt(self.sides_G2.prod(axis=1))
        low, high = np.quantile(lengths, [0.05, 0.95])
        levels = len(self.grid.names)
        # from the smallest anchor of the first level to the largest of the last one
        factor = (high / low) ** (1 / max(levels - 1 / octave, 1))
        shapes = [_kmeans(np.log(self.sides_G2[:, 1] / self.sides_G2[:, 0]), num_ratios)]
        if len(ratios) == num_ratios:
            shapes.append(ratios)
        cells_A4 = self.grid.cells[0]
        first = float(np.sqrt((cells_A4[:, 2:] - cells_A4[:, :2]).prod(axis=1)).min())
        of_boxes, of_config = (float(low), float(np.clip(factor, 1.05, 4))), (first, 2.0)
        starts = [_Anchors(*series, octave, x) for series in (of_boxes, of_config) for x in shapes]
        starts.sort(key=self._score, reverse=True)
        return max(map(self._climb, starts[:2]), key=self._score)

    def _climb(self, anchors: _Anchors) -> _Anchors:
        score, left = self._score(anchors), _EVALUATIONS
        levels = len(self.grid.names)
        limit = _MAX_SIZE * float(np.sqrt(self.sides_G2.prod(axis=1).max()))
        for step in _STEPS:
            for number in range(2 + len(anchors.ratios)):
                for by in (step, 1 / step):
                    while left:
                        other, left = anchors.changed(number, by), left - 1
                        if anchors.largest(levels) < other.largest(levels) > limit:
                            break
                        other_score = self._score(other)
                        if other_score <= score + 1e-4:
                            break
                        anchors, score = other, other_score
        return anchors


def _kmeans(log_ratio_G: np.ndarray, k: int) -> tuple[float, ...]:
    """k ratios, by k-means of shapes of one area with 1 - IoU as the distance.

    Two such boxes whose log ratios differ by d overlap in exp(-d / 2) of their area. So the nearest
    in IoU is the nearest in log ratio, and the mean is that of log ratios.
    """
    centres = np.quantile(log_ratio_G, (np.arange(k) + 0.5) / k)
    for _ in range(20):
        nearest = np.abs(log_ratio_G[:, None] - centres).argmin(axis=1)
        counts = np.bincount(nearest, minlength=k)
        sums = np.bincount(nearest, weights=log_ratio_G, minlength=k)
        centres = np.where(counts > 0, sums / counts.clip(min=1), centres)
    limit = np.log(_MAX_RATIO)
    return tuple(np.exp(centres.clip(-limit, limit)).tolist())
