"""The score from which a detection is worth showing: that of the best F1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["GRID", "Threshold", "best_threshold", "f1", "sweep"]

GRID = np.linspace(0, 1, 101)  # of scores, for curves


@dataclass(frozen=True)
class Threshold:
    """What is counted if detections below a score are dropped.

    Args:
        score: the threshold; None: no detection of the class is right, so none is better.
        precision: share of detections that are right; None: there are none.
        recall: share of objects that are found; None: there are none.
        f1: harmonic mean of the two: 2 TP / (detections + objects).
    """

    score: float | None
    precision: float | None
    recall: float | None
    f1: float | None


def f1(right: np.ndarray, detections: np.ndarray, objects: int) -> np.ndarray:
    """2 TP / (2 TP + FP + FN); 0 where there is nothing."""
    return 2 * right / np.maximum(detections + objects, 1)


def best_threshold(scores: np.ndarray, right: np.ndarray, objects: int) -> Threshold:
    """The threshold of the highest F1 on these detections; of equal ones the highest.

    It is exact: every score is tried, and no precision is interpolated, as in AP.

    Args:
        scores: (N,).
        right: (N,) bool.
        objects: number of objects, without crowds.
    """
    cuts, hits, kept = _counts(scores, right)
    values = f1(hits, kept, objects)
    if not len(values) or not objects or not hits[0]:
        return Threshold(None, None, 0.0 if objects else None, 0.0 if objects else None)
    best = len(values) - 1 - int(values[::-1].argmax())  # cuts rise
    return Threshold(
        float(cuts[best]),
        float(hits[best] / kept[best]),
        float(hits[best] / objects),
        float(values[best]),
    )


def sweep(
    scores: np.ndarray, right: np.ndarray, objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 with each threshold of :data:`GRID`; NaN where undefined."""
    order = np.argsort(scores)
    first = np.searchsorted(scores[order], GRID)  # the first that is kept
    total = np.concatenate([[0], np.cumsum(right[order])])
    hits, kept = total[-1] - total[first], len(scores) - first
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / objects if objects else np.full(len(GRID), np.nan)
        return hits / kept, recall, f1(hits, kept, objects)


def _counts(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each score that occurs, rising; right ones and all from it on."""
    order = np.argsort(scores)
    cuts, first = np.unique(scores[order], return_index=True)
    hits = np.cumsum(right[order][::-1])[::-1]
    return cuts, hits[first] if len(hits) else hits, len(scores) - first
