"""What a report says, as plain numbers and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .ground_truth import GroundTruth
from .predictions import Found
from .thresholds import GRID, Threshold

__all__ = [
    "Analysis",
    "Case",
    "ClassResult",
    "Comparison",
    "Curves",
    "ErrorType",
    "ImageResult",
    "Shown",
]


@dataclass(frozen=True)
class ClassResult:
    """One class.

    Args:
        name: its name.
        objects, images: its objects without crowds, and the images that have any.
        detections: above the score threshold of the model's config.
        metrics: AP, AP50, AP75, APs, APm, APl, AR100 in percent; None: there are no such objects.
        best: the threshold of the best F1.
        ece: mean distance between its scores and the share that is right; None: no detections.
    """

    name: str
    objects: int
    images: int
    detections: int
    metrics: dict[str, float | None]
    best: Threshold
    ece: float | None


@dataclass(frozen=True)
class ErrorType:
    """One of TIDE's six kinds of errors (Bolya et al., ECCV 2020).

    Args:
        name: Cls, Loc, Both, Dupe, Bkg or Miss.
        count: how many there are among all detections, of any score.
        cost: AP50 that would be gained if they were put right, in points.
    """

    name: str
    count: int
    cost: float


@dataclass(frozen=True)
class ImageResult:
    """One image, counted at the score thresholds: right, wrong, missed."""

    file_name: str
    objects: int
    right: int
    wrong: int
    missed: int


@dataclass(frozen=True)
class Case:
    """One mistake.

    Args:
        kind: "suspect" (of the annotation), "swap", "false_positive", "miss".
        image: index of the image.
        text: what is wrong, in a sentence.
        found, score, box: class, score and XYWH box of the detection; None for a miss.
        true, true_box: class and box of the object that it is about, if there is one.
        iou: of the two boxes.
        first: among the worst of all classes; otherwise of its class only.
    """

    kind: str
    image: int
    text: str
    found: int | None = None
    score: float | None = None
    box: tuple[float, ...] | None = None
    true: int | None = None
    true_box: tuple[float, ...] | None = None
    iou: float | None = None
    first: bool = True


@dataclass(frozen=True, eq=False)
class Shown:
    """What a user of a model sees: its detections from the threshold of their class on.

    Args:
        found: M detections. Those on crowds, which do not count, are left out.
        right: (M,) bool.
        missed: (G,) whether an object has no right detection. Never a crowd.
    """

    found: Found
    right: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True, eq=False)
class Curves:
    """Arrays for charts; NaN where there is nothing.

    Args:
        ious: (3,) of the precision-recall curves.
        mean_precision: (3, 101) at the recalls 0, .01, ... 1, averaged over the classes.
        precision: (K, 3, 101) of each class.
        ap_by_iou: (10,) at IoU .5, .55, ... .95 in percent, over all classes.
        class_ap_by_iou: (K, 10).
        sweep: (3, 101) precision, recall and F1 of all detections at the thresholds 0, .01, ... 1.
        class_sweep: (K, 3, 101).
    """

    ious: tuple[float, ...]
    mean_precision: np.ndarray
    precision: np.ndarray
    ap_by_iou: np.ndarray
    class_ap_by_iou: np.ndarray
    sweep: np.ndarray
    class_sweep: np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """This model against another one on the same images. Differences are this minus the other.

    Args:
        metrics: name -> {"this", "other", "difference", "lower", "upper", "better"}: AP in percent,
            the 95 % interval of the difference, and the probability that this model is better; None
            where the images do not tell.
        classes: (K,) difference of AP in points; NaN where a class has no objects.
        resamples: of the images.
        changed: (image, mistakes of the other, mistakes of this) of the images that changed most.
        more, fewer: number of images with more and with fewer mistakes than the other's.
        other: what the other model shows.
    """

    metrics: dict[str, dict[str, float | None]]
    classes: np.ndarray
    resamples: int
    changed: list[tuple[int, int, int]]
    more: int
    fewer: int
    other: Shown = field(repr=False)


@dataclass(frozen=True, eq=False)
class Analysis:
    """All numbers of a report. AP is in percent, shares and scores are from 0 to 1.

    Args:
        truth, found: what was compared.
        shown: the detections from the thresholds on.
        metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100.
        classes: (K,).
        thresholds: (K,) of scores, at which right, wrong and missed are counted.
        chosen: the score that the user chose for all classes; None: each class has its best.
        overall: one threshold for all classes: that of the best F1.
        right, wrong, missed: numbers of detections and objects at the thresholds.
        curves: for the charts.
        confusion: (K + 1, K + 1) objects (rows) by what they are taken for (columns), at the
            thresholds; the last is background.
        errors: TIDE's types, the most expensive first; ``base`` is the AP50 that they are lost
            from, ``false_positives`` and ``false_negatives`` what all of either cost.
        calibration: {"ece", "mce", "bins"}, hotcoco's.
        images: (I,).
        cases: kind -> the worst of them.
        comparison: with another model's predictions.
    """

    truth: GroundTruth
    found: Found
    shown: Shown
    metrics: dict[str, float | None]
    classes: list[ClassResult]
    thresholds: np.ndarray
    chosen: float | None
    overall: Threshold
    right: int
    wrong: int
    missed: int
    curves: Curves
    confusion: np.ndarray
    errors: list[ErrorType]
    base: float
    false_positives: float
    false_negatives: float
    calibration: dict[str, Any]
    images: list[ImageResult]
    cases: dict[str, list[Case]]
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON. What is not defined is None."""
        truth, curves = self.truth, self.curves
        rows, columns = np.nonzero(self.confusion)
        order = np.argsort(-self.confusion[rows, columns].astype(np.int64), kind="stable")
        names = [*truth.class_names, "background"]
        content: dict[str, Any] = {
            "dataset": truth.name,
            "images": len(truth.image_ids),
            "objects": int((~truth.crowds).sum()),
            "crowds": int(truth.crowds.sum()),
            "detections": len(self.found),
            "metrics": self.metrics,
            "ap_by_iou": dict(zip(_IOUS, curves.ap_by_iou.tolist())),
            "classes": [
                {
                    **asdict(c),
                    "used_threshold": float(self.thresholds[k]),
                    "ap_by_iou": dict(zip(_IOUS, curves.class_ap_by_iou[k].tolist())),
                }
                for k, c in enumerate(self.classes)
            ],
            "best_threshold_for_all_classes": asdict(self.overall),
            "at_thresholds": {
                "chosen": self.chosen,
                "right": self.right,
                "wrong": self.wrong,
                "missed": self.missed,
            },
            "curves": {
                "recall": GRID.tolist(),
                "precision_by_iou": dict(zip(curves.ious, curves.mean_precision.tolist())),
                "score": GRID.tolist(),
                **dict(zip(("precision", "recall_at_score", "f1"), curves.sweep.tolist())),
            },
            "confusion": [
                {
                    "object": names[rows[i]],
                    "detected_as": names[columns[i]],
                    "count": int(self.confusion[rows[i], columns[i]]),
                }
                for i in order
            ],
            "errors": {
                "AP50": self.base,
                "types": [asdict(error) for error in self.errors],
                "all_false_positives": self.false_positives,
                "all_false_negatives": self.false_negatives,
            },
            "calibration": self.calibration,
            "by_image": [
                {"image_id": i, **asdict(image)} for i, image in zip(truth.image_ids, self.images)
            ],
            "cases": {kind: list(map(self._case, cases)) for kind, cases in self.cases.items()},
        }
        if self.comparison is not None:
            content["against"] = self._comparison(self.comparison)
        return _plain(content)

    def to_json(self) -> str:
        """:meth:`to_dict` as text of ASCII letters."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def _case(self, case: Case) -> dict[str, Any]:
        names = self.truth.class_names
        return {
            "image_id": self.truth.image_ids[case.image],
            "file_name": self.truth.file_names[case.image],
            "what": case.text,
            "detected_as": None if case.found is None else names[case.found],
            "score": case.score,
            "box": case.box,
            "object": None if case.true is None else names[case.true],
            "object_box": case.true_box,
            "iou": case.iou,
        }

    def _comparison(self, comparison: Comparison) -> dict[str, Any]:
        return {
            "metrics": comparison.metrics,
            "resamples": comparison.resamples,
            "classes": dict(zip(self.truth.class_names, comparison.classes.tolist())),
            "images_with_more_mistakes": comparison.more,
            "images_with_fewer_mistakes": comparison.fewer,
            "changed": [
                {
                    "image_id": self.truth.image_ids[image],
                    "file_name": self.truth.file_names[image],
                    "mistakes_of_the_other": before,
                    "mistakes": after,
                }
                for image, before, after in comparison.changed
            ],
        }


_IOUS = [f"{iou:.2f}" for iou in np.linspace(0.5, 0.95, 10)]


def _plain(value: Any) -> Any:
    """None for NaN, and lists for tuples; JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
