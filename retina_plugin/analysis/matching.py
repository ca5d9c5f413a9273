"""hotcoco's evaluation of detections, and which of them are right."""

from __future__ import annotations

from typing import Any

import numpy as np

from retina_plugin.optional import optional

from .ground_truth import GroundTruth
from .predictions import Found

__all__ = ["IOU", "Evaluation", "mean_ap"]

IOU = 0.5  # from which a detection is right, in everything but AP over ten IoUs
_IOU_AXIS = np.linspace(0.5, 0.95, 10)


class Evaluation:
    """The matches of detections with objects, at COCO's ten IoUs.

    hotcoco's numbers equal pycocotools'. It sees every image, class and object under its place
    in the dataset, counted from 1, so any ids will do.

    Attributes:
        coco: hotcoco's ``COCOeval`` after ``accumulate()``.
        precision: (10 IoUs, 101 recalls, K, 4 sizes) precision at 100 detections an image; -1 where
            there are no objects. Sizes are all, small, medium, large.
        recall: (10, K, 4) the highest recall.
        right: (N,) 1 for a detection that is right at :data:`IOU`, 0 for one that is wrong, -1 for
            one that does not count: on a crowd, or beyond ``limit``.
        missed: (G,) whether an object has no detection of its class at :data:`IOU`. Never a crowd.

    Args:
        truth: the objects.
        found: the detections.
        limit: only so many of an image and class count, the best ones. 100 is COCO's number.
    """

    def __init__(self, truth: GroundTruth, found: Found, limit: int = 100) -> None:
        hotcoco = optional("hotcoco", "retina report")
        objects = hotcoco.COCO.from_arrays(
            [{"id": i + 1} for i in range(len(truth.image_ids))],
            [{"id": k + 1, "name": str(k)} for k in range(len(truth.class_names))],
            truth.images + 1,
            truth.classes + 1,
            truth.boxes,
            area=truth.areas,
            iscrowd=truth.crowds,
        )
        rows = np.column_stack([found.images + 1, found.boxes, found.scores, found.classes + 1])
        self.coco = hotcoco.COCOeval(objects, objects.load_res(rows.astype(np.float64)), "bbox")
        self.coco.params.max_dets = [1, 10, limit]
        self.coco.evaluate()
        self.coco.accumulate()
        self.precision: np.ndarray = self.coco.eval["precision"][..., -1]
        self.recall: np.ndarray = self.coco.eval["recall"][..., -1]
        self.diagnostics: dict[str, Any] = self.coco.image_diagnostics(IOU)
        self.right = np.full(len(found), -1, np.int8)
        for detection, status in self.diagnostics["dt_status"].items():
            self.right[detection - 1] = status == "tp"
        self.missed = np.zeros(len(truth.boxes), bool)
        for annotation, status in self.diagnostics["gt_status"].items():
            self.missed[annotation - 1] = status == "fn"

    def summary(self) -> dict[str, float | None]:
        """COCO's AP in percent, by IoU and size, and AR with 1, 10 and 100 detections an image."""
        recall = self.coco.eval["recall"]
        return {
            "AP": mean_ap(self.precision[..., 0]),
            "AP50": mean_ap(self.precision[0, ..., 0]),
            "AP75": mean_ap(self.precision[5, ..., 0]),
            "APs": mean_ap(self.precision[..., 1]),
            "APm": mean_ap(self.precision[..., 2]),
            "APl": mean_ap(self.precision[..., 3]),
            "AR1": mean_ap(recall[:, :, 0, 0]),
            "AR10": mean_ap(recall[:, :, 0, 1]),
            "AR100": mean_ap(recall[:, :, 0, 2]),
        }


def mean_ap(values: np.ndarray) -> float | None:
    """Mean of those that are not -1, in percent; None if there are none."""
    computed = values[values > -1]
    return 100 * float(computed.mean()) if len(computed) else None
