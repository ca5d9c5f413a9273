"""How sure an AP is: 95 % intervals over the images of the test set and the seeds of the training.

Two results differ by chance for two reasons: other test images would give other APs, and so would
other seeds. Both are resampled with replacement (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993):

- images: every run is scored on the same 200 resamples of the test images, so an image that is hard
  for all rows does not widen the interval of their difference;
- seeds: a row's mean over n seeds is drawn from its n runs. Means of n draws spread less than means
  of n new seeds would, by sqrt((n - 1) / n); the deviations are enlarged by the inverse.

With few seeds such an interval is a little short: of normally spread APs, it covers the true
difference of two rows in 91 % of cases with two seeds and in 94 % with three (see the tests).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["RESAMPLES", "difference_interval", "interval", "resampled_ap"]

RESAMPLES = 200  # of the images
_DRAWS = 10000  # of the seeds and one of the resamples


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


def interval(runs: Sequence[Sequence[float]], mean: float) -> tuple[float, float]:
    """95 % interval of a row's mean AP.

    Args:
        runs: AP on the resamples, of each seed. With one seed, only the images vary.
        mean: the mean AP of the seeds, on all images.
    """
    return _around(mean, _draw(np.array(runs), *_chosen(len(runs), 0)))


def difference_interval(
    better: Sequence[Sequence[float]], worse: Sequence[Sequence[float]], difference: float
) -> tuple[float, float]:
    """95 % interval of the difference of two rows' mean APs; arguments as in :func:`interval`."""
    resample, seeds = _chosen(len(better), 0)
    _, other_seeds = _chosen(len(worse), 1)
    draws = _draw(np.array(better), resample, seeds) - _draw(np.array(worse), resample, other_seeds)
    return _around(difference, draws)


def _chosen(num_seeds: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """For each draw, its resample of the images, and its seeds."""
    resample = np.random.default_rng(0).integers(RESAMPLES, size=_DRAWS)
    seeds = np.random.default_rng([1, stream]).integers(num_seeds, size=(_DRAWS, num_seeds))
    return resample, seeds


def _draw(runs: np.ndarray, resample: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(draws,) the mean AP of the drawn seeds on the drawn images."""
    n = len(runs)
    centre = runs[:, resample].mean(axis=0)
    drawn = runs[seeds, resample[:, None]].mean(axis=1)
    enlarged = np.sqrt(n / (n - 1)) if n > 1 else 1.0
    return centre + enlarged * (drawn - centre)


def _around(value: float, draws: np.ndarray) -> tuple[float, float]:
    """The draws' deviations from their mean, around the value on all images."""
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return value + float(low), value + float(high)
