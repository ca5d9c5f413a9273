"""The same images with the detections of several models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from retina_plugin.analysis.ground_truth import read_ground_truth
from retina_plugin.analysis.matching import Evaluation
from retina_plugin.analysis.predictions import read_predictions
from retina_plugin.analysis.thresholds import best_threshold
from retina_plugin.predict.images import as_bgr

from .style import Plot, new_figure

__all__ = ["draw"]

# On photos: brighter than the colours of lines on white.
_RIGHT, _WRONG, _MISSED = "#00E676", "#FF5252", "#FFEB3B"


def draw(predictions: Mapping[str, Path], dataset: str, images: int = 3) -> Plot:
    """A row for each model, with its detections above the score of its best F1.

    Args:
        predictions: label -> file in COCO's result format.
        dataset: name of a registered dataset.
        images: so many, the first of those with the most objects.
    """
    truth = read_ground_truth(dataset)
    counts = np.bincount(truth.images, minlength=len(truth.image_ids))
    chosen = np.flatnonzero(counts == counts.max())[:images]
    figure, panels = new_figure(3.2 * images, 3.3 * len(predictions), images, len(predictions))
    rows = []
    for number, (label, path) in enumerate(predictions.items()):
        found = read_predictions(path, truth)
        evaluation = Evaluation(truth, found)
        counted = evaluation.right >= 0
        best = best_threshold(
            found.scores[counted], evaluation.right[counted] == 1, len(truth.boxes)
        )
        score = 1.0 if best.score is None else best.score
        rows.append([label, score, best.precision, best.recall, best.f1])
        kept = found[found.scores >= score]
        shown = Evaluation(truth, kept)
        of_row = panels[number * images : (number + 1) * images]
        for axes, image in zip(of_row, chosen):
            here = kept.images == image
            missed = truth.boxes[shown.missed & (truth.images == image)]
            _panel(axes, truth.path(image), missed)
            for box, k, right in zip(kept.boxes[here], kept.classes[here], shown.right[here]):
                colour = _RIGHT if right == 1 else _WRONG
                _box(axes, box, colour)
                name, place = truth.class_names[k], (box[0], max(box[1] - 2, 8))
                axes.text(*place, name, color=colour, fontsize=10, fontweight="bold")
        of_row[0].set_ylabel(f"{label}\nscore ≥ {score:.2f}")
    header = ["model", "score", "precision", "recall", "F1"]
    return Plot(figure, {"": (header, rows)})


def _panel(axes: Axes, file: str, missed: np.ndarray) -> None:
    axes.imshow(as_bgr(file)[:, :, ::-1])
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for box in missed:
        _box(axes, box, _MISSED, dashed=True)


def _box(axes: Axes, box: np.ndarray, colour: str, dashed: bool = False) -> None:
    x, y, w, h = box
    style = "--" if dashed else "-"
    axes.add_patch(
        Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style)
    )
