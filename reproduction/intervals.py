"""How sure an AP is: 95 % intervals over the images of the test set and the seeds of the training.

Two results differ by chance for two reasons: other test images would give other APs, and so would
other seeds.

- Images: every run is scored on the same 200 resamples of the test images (the bootstrap; Efron and
  Tibshirani, "An Introduction to the Bootstrap", 1993). An image that is hard for all rows does not
  widen the interval of their difference.
- Seeds: two or three seeds say little about the spread of one row, so each row's variance is drawn
  towards that of all rows (Smyth, "Linear Models and Empirical Bayes Methods for Assessing
  Differential Expression in Microarray Experiments", 2004). A row that varies far more than the
  others has its own variance: rows that learn late differ by many points from seed to seed.

The interval is that of Welch's test: t sqrt(image variance + seed variance / seeds of each row). In
simulations it covers the true difference of two rows in 93 to 99 % of cases, with two seeds too, if
the APs of the seeds are spread normally. With a row that varies ten times as much as the others it
is at least 92 % with three seeds, and 83 % with two, which can be close by chance (see the tests).
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
from scipy.optimize import brentq  # scipy comes with scikit-learn, of the extra "demo"
from scipy.special import digamma, polygamma
from scipy.stats import f as f_distribution
from scipy.stats import t as student_t

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


_OWN = 0.8  # a row whose variance is that improbable for the others' (F test) has its own


@dataclass(frozen=True)
class SeedSpread:
    """How much AP varies with the seed, in a row of which nothing else is known.

    Args:
        variance: of one run's AP, in squared percent.
        freedom: how many degrees of freedom that knowledge is worth: few if the rows differ much
            in their variance. 0 if no row has two seeds.
    """

    variance: float = 0.0
    freedom: float = 0.0

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[float]]) -> SeedSpread:
        """Estimate it from the APs of the seeds of each row (Smyth 2004, section 6.2).

        Rows without a spread are left out: they did not learn, or have one seed.
        """
        several = [aps for aps in rows if len(aps) > 1 and np.ptp(aps) > 0]
        if not several:
            return cls()
        freedom_R = np.array([len(aps) - 1 for aps in several])
        variance_R = np.array([np.var(aps, ddof=1) for aps in several])
        total = float(freedom_R.sum())
        pooled = float(freedom_R @ variance_R) / total
        log_R = np.log(variance_R) - digamma(freedom_R / 2) + np.log(freedom_R / 2)
        # How much more the logarithms differ than by chance, if all rows had one variance.
        excess = log_R.var(ddof=1) - _trigamma(freedom_R / 2).mean() if len(several) > 1 else 0.0
        if excess <= _trigamma(total / 2):
            return cls(pooled, total)
        half = float(brentq(lambda x: _trigamma(x) - excess, 1e-3, total / 2))
        return cls(float(np.exp(log_R.mean() + digamma(half) - np.log(half))), 2 * half)

    def of_row(self, aps: Sequence[float]) -> tuple[float, float]:
        """A row's variance of one run, and its degrees of freedom; the APs of its seeds are given.

        Without any knowledge the variance is 0.
        """
        own_freedom = len(aps) - 1
        if self.freedom + own_freedom == 0:
            return 0.0, np.inf
        own = float(np.var(aps, ddof=1)) if own_freedom else 0.0
        if own_freedom and self.freedom:
            limit = self.variance * f_distribution.ppf(_OWN, own_freedom, self.freedom)
            if own > limit:
                return own, own_freedom
        freedom = self.freedom + own_freedom
        return (self.freedom * self.variance + own_freedom * own) / freedom, freedom


def _trigamma(x: Any) -> Any:
    return polygamma(1, x)


def interval(
    runs: Sequence[Sequence[float]], mean: float, spread: SeedSpread
) -> tuple[float, float]:
    """95 % interval of a row's mean AP.

    Args:
        runs: AP on the resamples, of each seed.
        mean: the mean AP of the seeds, on all images.
        spread: of all rows. If it is not known, only the images vary.
    """
    return _around(mean, np.mean(runs, axis=0), [runs], spread)


def difference_interval(
    better: Sequence[Sequence[float]],
    worse: Sequence[Sequence[float]],
    difference: float,
    spread: SeedSpread,
) -> tuple[float, float]:
    """95 % interval of the difference of two rows' mean APs; arguments as in :func:`interval`."""
    images = np.mean(better, axis=0) - np.mean(worse, axis=0)
    return _around(difference, images, [better, worse], spread)


def _around(
    value: float, images: np.ndarray, rows: Sequence[Sequence[Sequence[float]]], spread: SeedSpread
) -> tuple[float, float]:
    """The interval, from the value on the resamples and the seeds of each row."""
    # Welch and Satterthwaite: the images' part is known well, so it has no degrees of freedom.
    total, uncertain = float(images.var(ddof=1)), 0.0
    for runs in rows:
        variance, freedom = spread.of_row(np.mean(runs, axis=1))
        of_mean = variance / len(runs)
        total += of_mean
        uncertain += of_mean**2 / freedom
    freedom = total**2 / uncertain if uncertain else np.inf
    half = float(student_t.ppf(0.975, freedom)) * total**0.5
    return value - half, value + half
