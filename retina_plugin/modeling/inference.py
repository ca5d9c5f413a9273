"""From dense predictions to detections (section 4.1, "Inference")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import batched_nms  # class-wise NMS in fp32, also without compiled parts
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .shapes import permute_to_NRD

__all__ = ["DenseInference"]


class DenseInference:
    """Score threshold and top-k by level, decoding, then NMS by class over all levels.

    Results equal those of Detectron2's ``RetinaNet`` with the same settings, order included.

    Args:
        num_classes: K.
        box2box_transform: decodes deltas (``apply_deltas``).
        score_thresh: only scores above it are looked at (.05).
        topk_candidates: predictions of a level that are decoded (1000).
        nms_thresh: IoU above which the lower-scored of two boxes of a class goes (.5).
        max_detections: detections of an image (100, COCO's limit).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: Any,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections

    @torch.no_grad()
    def __call__(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Detect in a batch.

        Args:
            anchors: per level (Hi*Wi*A, 4).
            logits, deltas: per level (N, A*K, Hi, Wi) and (N, A*4, Hi, Wi).
            image_sizes: N pairs (height, width) in pixels, without padding.

        Returns:
            N Instances with pred_boxes (XYXY pixels of the network's input, not clipped),
            scores (probabilities, decreasing) and pred_classes.
        """
        logits_NRK = [permute_to_NRD(x, self.num_classes) for x in logits]
        deltas_NR4 = [permute_to_NRD(x, 4) for x in deltas]
        return [
            self._detect(
                [a.tensor for a in anchors],
                [x[n] for x in logits_NRK],
                [x[n] for x in deltas_NR4],
                image_size,
            )
            for n, image_size in enumerate(image_sizes)
        ]

    def _detect(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        levels = [self._candidates(*level) for level in zip(anchors, logits, deltas)]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*levels))
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.max_detections]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[keep]),
            scores=scores[keep],
            pred_classes=classes[keep],
        )

    def _candidates(
        self, anchors_R4: Tensor, logits_RK: Tensor, deltas_R4: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes of one level that are worth an NMS."""
        scores_RK = logits_RK.sigmoid()
        anchor, class_ = torch.where(scores_RK > self.score_thresh)
        scores = scores_RK[anchor, class_]
        scores, best = scores.topk(min(len(scores), self.topk_candidates))
        anchor, class_ = anchor[best], class_[best]
        boxes = self.box2box_transform.apply_deltas(deltas_R4[anchor], anchors_R4[anchor])
        return boxes, scores, class_
