"""How sure an AP is: 95 % intervals over the images of the test set and the seeds of the training.

Two results differ by chance for two reasons: other test images would give other APs, and so would
other seeds.

- Images: every run is scored on the same 200 resamples of the test images (the bootstrap; Efron and
  Tibshirani, "An Introduction to the Bootstrap", 1993). An image that is hard for all rows does not
  widen the interval of their difference.
- Seeds: two or three seeds say little about the spread of one row, so the variance over seeds is
  pooled over all rows. A row that varies more than that has its own variance.

The interval is that of Welch's test: t sqrt(image variance + seed variance / seeds of each row). It
covers the true difference of two rows in 95 % of cases or more, with two seeds too, if the APs of
the seeds are spread normally (see the tests).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import t as student_t  # comes with scikit-learn, of the extra "demo"

__all__ = ["RESAMPLES", "SeedSpread", "difference_interval", "interval", "resampled_ap"]

RESAMPLES = 200  # of the images


def resampled_ap(annotations: Path, predictions: Sequence[dict[str, Any]]) -> np.ndarray:
    """(RESAMPLES,) COCO's AP in percent on resamples of the images, the same for every model.

    pycocotools matches detections and objects once. An image that a resample has n times counts n
    times in precision and recall: the numbers equal those of a dataset with n copies of it.

    Args:
        annotations: COCO's JSON file.
        predictions: COCO's result list.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each step
        truth = COCO(str(annotations))
    num_images = len(truth.getImgIds())
    uniform = np.full(num_images, 1 / num_images)
    weights = np.random.default_rng(0).multinomial(num_images, uniform, size=RESAMPLES)
    return weighted_ap(truth, predictions, weights)


def weighted_ap(
    truth: COCO, predictions: Sequence[dict[str, Any]], weights: np.ndarray
) -> np.ndarray:
    """(B,) COCO's AP in percent, for each row of weights.

    Args:
        truth: the objects.
        predictions: COCO's result list.
        weights: (B, images) how often each image counts. Images are in the order of their ids.
    """
    if not predictions:
        return np.zeros(len(weights))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCOeval(truth, truth.loadRes(list(predictions)), "bbox")
        coco.params.areaRng, coco.params.areaRngLbl = [[0, 1e10]], ["all"]
        coco.evaluate()
    num_images = len(coco.params.imgIds)
    values = []  # (B, 10 IoUs) of each class
    for k in range(len(coco.params.catIds)):
        images = coco.evalImgs[k * num_images : (k + 1) * num_images]
        values.append(_class_ap(images, weights, coco.params))
    return 100 * np.nanmean(np.stack(values), axis=(0, 2))


def _class_ap(images: Sequence[Any], weights: np.ndarray, params: Any) -> np.ndarray:
    """(B, 10) AP of one class at each IoU; NaN where a resample has no object of it."""
    used = [(i, image) for i, image in enumerate(images) if image is not None]
    result = np.full((len(weights), len(params.iouThrs)), np.nan)
    if not used:
        return result
    objects = np.zeros(len(images))
    for i, image in used:
        objects[i] = np.count_nonzero(~image["gtIgnore"].astype(bool))
    num_objects = weights @ objects
    present = num_objects > 0
    scores = np.concatenate([image["dtScores"] for _, image in used])
    order = np.argsort(-scores, kind="stable")
    image_of = np.repeat([i for i, _ in used], [len(image["dtScores"]) for _, image in used])[order]
    matched = np.concatenate([image["dtMatches"] for _, image in used], axis=1)[:, order] > 0
    counts = ~np.concatenate([image["dtIgnore"] for _, image in used], axis=1)[:, order].astype(
        bool
    )
    weight_BD = weights[present][:, image_of]
    for t, (right, counted) in enumerate(zip(matched & counts, counts)):
        found = np.cumsum(weight_BD * right, axis=1)
        kept = np.cumsum(weight_BD * counted, axis=1)
        precision = found / np.maximum(kept, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        envelope = np.pad(envelope, ((0, 0), (0, 1)))  # recalls that are not reached: 0
        recall = found / num_objects[present, None]
        at = np.stack([np.searchsorted(row, params.recThrs, side="left") for row in recall])
        result[present, t] = np.take_along_axis(envelope, at, axis=1).mean(axis=1)
    return result


@dataclass(frozen=True)
class SeedSpread:
    """How much AP varies with the seed.

    Args:
        variance: of one run's AP, in squared percent.
        freedom: degrees of freedom that it was measured with; 0 if no row has two seeds.
    """

    variance: float = 0.0
    freedom: int = 0

    @classmethod
    def pooled(cls, rows: Iterable[Sequence[float]]) -> SeedSpread:
        """The variance that all rows share; the APs of the seeds of each are given."""
        several = [np.asarray(aps) for aps in rows if len(aps) > 1]
        freedom = sum(len(aps) - 1 for aps in several)
        squares = sum(float(((aps - aps.mean()) ** 2).sum()) for aps in several)
        return cls(squares / freedom, freedom) if freedom else cls()


def interval(
    runs: Sequence[Sequence[float]], mean: float, spread: SeedSpread
) -> tuple[float, float]:
    """95 % interval of a row's mean AP.

    Args:
        runs: AP on the resamples, of each seed.
        mean: the mean AP of the seeds, on all images.
        spread: of all rows. If it is not known, only the images vary.
    """
    images = np.mean(runs, axis=0)
    return _around(mean, images, [_seed_variance(runs, spread)], spread)


def difference_interval(
    better: Sequence[Sequence[float]],
    worse: Sequence[Sequence[float]],
    difference: float,
    spread: SeedSpread,
) -> tuple[float, float]:
    """95 % interval of the difference of two rows' mean APs; arguments as in :func:`interval`."""
    images = np.mean(better, axis=0) - np.mean(worse, axis=0)
    seeds = [_seed_variance(runs, spread) for runs in (better, worse)]
    return _around(difference, images, seeds, spread)


def _seed_variance(runs: Sequence[Sequence[float]], spread: SeedSpread) -> float:
    """Of the mean AP of a row's seeds."""
    own = float(np.mean(runs, axis=1).var(ddof=1)) if len(runs) > 1 else 0.0
    return max(spread.variance, own) / len(runs)


def _around(
    value: float, images: np.ndarray, seeds: Sequence[float], spread: SeedSpread
) -> tuple[float, float]:
    """The interval, from the value on the resamples and the variance over each row's seeds."""
    total, of_seeds = float(images.var(ddof=1)) + sum(seeds), sum(seeds)
    # Welch and Satterthwaite: the images' part is known well, so it has no degrees of freedom
    freedom = spread.freedom * (total / of_seeds) ** 2 if of_seeds and spread.freedom else np.inf
    half = float(student_t.ppf(0.975, freedom)) * total**0.5
    return value - half, value + half
