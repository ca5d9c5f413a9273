"""Two models on the same images: is the difference more than chance, and where is it?"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from retina_plugin.optional import optional

from .matching import Evaluation
from .result import Comparison, ImageResult, Shown

__all__ = ["compare"]

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_CHANGED = 12  # images
_NORMAL = NormalDist()
_WIDTH = _NORMAL.inv_cdf(0.975)  # of a 95 % interval to each side, in standard errors

Side = tuple[Evaluation, list[ImageResult]]


def compare(this: Side, other: Side, shown: Shown, resamples: int) -> Comparison:
    """Differences of AP with their intervals, and the images that changed most.

    Both models are scored on the same resamples of the images, so an image that is hard for both
    does not widen the interval.

    hotcoco counts an image that a resample draws twice only once, so a resample is a part f of the
    images, about 63 %, without repetition. Statistics of such parts spread less than the statistic
    of all images, by sqrt((1 - f) / f): its own interval is a quarter too narrow. The standard
    error is put right by that factor (the delete-d jackknife: Shao and Wu, "A general theory for
    jackknife variance estimation", 1989), and the interval is the normal one around the difference.

    Args:
        this, other: each model's evaluation and its images at its own thresholds.
        shown: what the other model shows.
        resamples: of the images.
    """
    hotcoco = optional("hotcoco", "retina report")
    result = hotcoco.compare(other[0].coco, this[0].coco, n_bootstrap=resamples, seed=0)
    metrics: dict[str, dict[str, float | None]] = {}
    for name in _METRICS:
        before, after = result["metrics_a"][name], result["metrics_b"][name]
        if before < 0 or after < 0:
            continue  # there are no such objects
        difference = 100 * (after - before)
        error = _standard_error(result, name)
        metrics[name] = {
            "this": 100 * after,
            "other": 100 * before,
            "difference": difference,
            "lower": None if error is None else difference - _WIDTH * error,
            "upper": None if error is None else difference + _WIDTH * error,
            "better": _NORMAL.cdf(difference / error) if error else None,
        }
    classes = np.full(this[0].precision.shape[2], np.nan)
    for entry in result["per_category"]:
        if entry["ap_a"] >= 0 and entry["ap_b"] >= 0:
            classes[entry["cat_id"] - 1] = 100 * entry["delta"]
    after, before = (np.array([x.wrong + x.missed for x in side[1]]) for side in (this, other))
    change = after - before
    order = np.argsort(-np.abs(change), kind="stable")[:_CHANGED]
    return Comparison(
        metrics=metrics,
        classes=classes,
        resamples=resamples,
        changed=[(int(i), int(before[i]), int(after[i])) for i in order if change[i]],
        more=int((change > 0).sum()),
        fewer=int((change < 0).sum()),
        other=shown,
    )


def _standard_error(result: dict[str, Any], name: str) -> float | None:
    """Of a difference in points; None without resamples, or with a single image."""
    images = result["num_images"]
    part = 1 - (1 - 1 / images) ** images  # expected share of the images that are drawn
    if not result["ci"] or part == 1:
        return None
    return float(100 * result["ci"][name]["std_err"] * math.sqrt(part / (1 - part)))
