"""Two models on the same images: is the difference more than chance, and where is it?"""

from __future__ import annotations

import numpy as np

from retina_plugin.optional import optional

from .matching import Evaluation
from .result import Comparison, ImageResult, Shown

__all__ = ["compare"]

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_CHANGED = 12  # images

Side = tuple[Evaluation, list[ImageResult]]


def compare(this: Side, other: Side, shown: Shown, resamples: int) -> Comparison:
    """Differences of AP with their bootstrap intervals, and the images that changed most.

    Both models are scored on the same resamples of the images, so an image that is hard for both
    does not widen the interval.

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
        interval = (result["ci"] or {}).get(name, {})
        metrics[name] = {
            "this": 100 * after,
            "other": 100 * before,
            "difference": 100 * (after - before),
            "lower": 100 * interval["lower"] if interval else None,
            "upper": 100 * interval["upper"] if interval else None,
            "better": interval.get("prob_positive"),
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
