"""All numbers of a report, from hotcoco."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from retina_plugin.errors import ConfigError

from .cases import find_cases
from .comparison import compare
from .ground_truth import GroundTruth, read_ground_truth
from .matching import IOU, Evaluation, mean_ap
from .predictions import Found, read_predictions
from .result import Analysis, ClassResult, Curves, ErrorType, ImageResult, Shown
from .thresholds import best_threshold, sweep

__all__ = ["analyze"]

Predictions = str | os.PathLike | Sequence[dict[str, Any]]

_CURVE_IOUS = {0.5: 0, 0.75: 5, 0.9: 8}  # IoU -> its place among COCO's ten
_NEVER = 1.1  # a threshold that no score reaches


def analyze(
    truth: str | GroundTruth,
    predictions: Predictions,
    against: Predictions | None = None,
    *,
    score: float | None = None,
    resamples: int = 200,
) -> Analysis:
    """What a model gets right and wrong on a dataset.

        analysis = analyze("digits_scenes_val", "coco_instances_results.json")
        print(analysis.metrics["AP"], analysis.classes[3].best.score)
        write_report(analysis, "out")

    AP, TIDE's errors and calibration count the 100 best detections of an image and class, as COCO
    does. Mistakes are counted among all detections from a score threshold on: that of the best F1
    of each class, or ``score``. Right is an IoU of .5 or more with an object of the same class.

    Args:
        truth: a registered dataset, or what :meth:`.GroundTruth.from_coco` makes of an annotation
            file.
        predictions: COCO's result list, as a JSON file or as it is; ``coco_instances_results.json``
            of an evaluation or ``predictions.json`` of ``retina predict``.
        against: those of another model on the same dataset, to compare with.
        score: one threshold for all classes.
        resamples: of the images, from which the interval of a difference follows.

    Raises:
        ConfigError: the dataset or the predictions cannot be read or do not belong together;
            hotcoco is not installed; one line.
    """
    if score is not None and not 0 <= score <= 1:
        raise ConfigError(f"score {score}: give a probability from 0 to 1")
    if not isinstance(truth, GroundTruth):
        truth = read_ground_truth(truth)
    found = read_predictions(predictions, truth)
    other = None if against is None else read_predictions(against, truth)
    evaluation = Evaluation(truth, found)
    at = AtThresholds(truth, found, evaluation, score)
    comparison = None
    if other is not None:
        its_evaluation = Evaluation(truth, other)
        its = AtThresholds(truth, other, its_evaluation, score)
        comparison = compare(
            (evaluation, at.images), (its_evaluation, its.images), its.shown, resamples
        )
    tide = _tide(truth, found, evaluation)
    calibration = evaluation.coco.calibration(10, IOU)
    per_class_ece = calibration.pop("per_category")
    return Analysis(
        truth=truth,
        found=found,
        shown=at.shown,
        metrics=evaluation.summary(),
        classes=_classes(truth, found, evaluation, at, per_class_ece),
        thresholds=at.thresholds,
        chosen=score,
        overall=at.overall,
        right=sum(image.right for image in at.images),
        wrong=sum(image.wrong for image in at.images),
        missed=sum(image.missed for image in at.images),
        curves=_curves(truth, found, evaluation, at.right),
        # hotcoco's limit is here one of an image, over all classes
        confusion=at.evaluation.coco.confusion_matrix(
            IOU, max_det=max(1, _most_in_an_image(at.shown.found))
        )["matrix"],
        errors=sorted(
            (
                ErrorType(name, count, 100 * tide["delta_ap"][name])
                for name, count in tide["counts"].items()
            ),
            key=lambda error: -error.cost,
        ),
        base=100 * tide["ap_base"],
        false_positives=100 * tide["delta_ap"]["FP"],
        false_negatives=100 * tide["delta_ap"]["FN"],
        calibration=calibration,
        images=at.images,
        cases=find_cases(
            truth, at.shown, found, at.thresholds, at.evaluation.diagnostics["label_errors"]
        ),
        comparison=comparison,
    )


def _tide(truth: GroundTruth, found: Found, evaluation: Evaluation) -> dict[str, Any]:
    """TIDE's errors. In TIDE, a crowd is no object, and a detection on it is no error.

    hotcoco takes a crowd for an object that a detection is near. So it gets neither the crowds nor
    the detections that do not count, which leaves AP as it is.
    """
    if truth.crowds.any():
        names = ("images", "classes", "boxes", "areas", "crowds")
        objects = {name: getattr(truth, name)[~truth.crowds] for name in names}
        truth = dataclasses.replace(truth, **objects)
        evaluation = Evaluation(truth, found[evaluation.right >= 0])
    tide: dict[str, Any] = evaluation.coco.tide_errors(IOU)
    return tide


class AtThresholds:
    """Detections that are shown to a user: those from the threshold of their class on.

    Attributes:
        right: (N,) of every detection, as :class:`.Evaluation` has it.
        best: (K,) the best threshold of each class.
        overall: the best one for all classes together.
        thresholds: (K,) the ones in use.
        shown: the detections.
        evaluation: of these alone.
        images: (I,).
    """

    def __init__(
        self, truth: GroundTruth, found: Found, evaluation: Evaluation, score: float | None
    ) -> None:
        limit = max(100, _most_in_an_image(found))
        if limit > 100:  # an image may show more than COCO counts
            evaluation = Evaluation(truth, found, limit)
        self.right = evaluation.right
        counts = self.right >= 0
        objects = _objects_by_class(truth)
        self.overall = best_threshold(
            found.scores[counts], self.right[counts] == 1, int(objects.sum())
        )
        self.best = [
            best_threshold(found.scores[own], self.right[own] == 1, int(objects[k]))
            for k, own in enumerate(_by_class(truth, found, counts))
        ]
        if score is None:
            # a class of which nothing is right has no best one
            fallback = self.overall.score if self.overall.score is not None else _NEVER
            self.thresholds = np.array(
                [fallback if b.score is None else b.score for b in self.best]
            )
        else:
            self.thresholds = np.full(len(objects), score)
        kept = found[counts & (found.scores >= self.thresholds[found.classes])]
        self.evaluation = Evaluation(truth, kept, limit)
        right, missed = self.evaluation.right == 1, self.evaluation.missed
        self.shown = Shown(kept, right, missed)
        columns = (truth.images[~truth.crowds], kept.images[right], kept.images[~right])
        counts_I = [
            np.bincount(images, minlength=len(truth.image_ids)).tolist()
            for images in (*columns, truth.images[missed])
        ]
        self.images = [
            ImageResult(name, *numbers) for name, *numbers in zip(truth.file_names, *counts_I)
        ]


def _most_in_an_image(found: Found) -> int:
    return int(np.bincount(found.images).max(initial=0))


def _objects_by_class(truth: GroundTruth) -> np.ndarray:
    return np.bincount(truth.classes[~truth.crowds], minlength=len(truth.class_names))


def _by_class(truth: GroundTruth, found: Found, counts: np.ndarray) -> list[np.ndarray]:
    """The places of the detections of each class that count."""
    (places,) = np.nonzero(counts)
    order = places[np.argsort(found.classes[places], kind="stable")]
    ends = np.searchsorted(found.classes[order], np.arange(len(truth.class_names) + 1))
    return [order[a:b] for a, b in itertools.pairwise(ends)]


def _classes(
    truth: GroundTruth,
    found: Found,
    evaluation: Evaluation,
    at: AtThresholds,
    ece: dict[str, float],
) -> list[ClassResult]:
    objects = _objects_by_class(truth)
    detections = np.bincount(found.classes, minlength=len(objects))
    pairs = np.unique(np.stack([truth.classes, truth.images])[:, ~truth.crowds], axis=1)
    images = np.bincount(pairs[0], minlength=len(objects))
    precision, recall = evaluation.precision, evaluation.recall
    return [
        ClassResult(
            name,
            int(objects[k]),
            int(images[k]),
            int(detections[k]),
            {
                "AP": mean_ap(precision[:, :, k, 0]),
                "AP50": mean_ap(precision[0, :, k, 0]),
                "AP75": mean_ap(precision[5, :, k, 0]),
                **{f"AP{s}": mean_ap(precision[:, :, k, i + 1]) for i, s in enumerate("sml")},
                "AR100": mean_ap(recall[:, k, 0]),
            },
            at.best[k],
            ece.get(str(k)),
        )
        for k, name in enumerate(truth.class_names)
    ]


def _curves(truth: GroundTruth, found: Found, evaluation: Evaluation, right: np.ndarray) -> Curves:
    places = list(_CURVE_IOUS.values())
    all_sizes = np.where(evaluation.precision[..., 0] < 0, np.nan, evaluation.precision[..., 0])
    of_class = all_sizes.transpose(2, 0, 1)  # (K, 10, 101)
    has_objects = ~np.isnan(of_class[:, 0, 0])
    mean = of_class[has_objects].mean(axis=0) if has_objects.any() else of_class[0]
    counts = right >= 0
    objects = _objects_by_class(truth)
    class_sweep = [
        sweep(found.scores[own], right[own] == 1, int(objects[k]))
        for k, own in enumerate(_by_class(truth, found, counts))
    ]
    return Curves(
        ious=tuple(_CURVE_IOUS),
        mean_precision=mean[places],
        precision=of_class[:, places],
        ap_by_iou=100 * mean.mean(axis=1),
        class_ap_by_iou=100 * of_class.mean(axis=2),
        sweep=np.array(sweep(found.scores[counts], right[counts] == 1, int(objects.sum()))),
        class_sweep=np.array(class_sweep),
    )
