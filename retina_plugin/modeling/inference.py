"""From dense predictions to detections (section 4.1, "Inference")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms  # class-wise NMS in fp32, also without compiled parts
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["DenseInference"]


class DenseInference:
    """Score threshold and top-k by level, decoding, then NMS by class over all levels.

    Detections equal those of Detectron2's ``RetinaNet`` with the same settings, order included (of
    equal scores the first anchor comes first, where Detectron2's order is torch's ``topk``). But
    the raw logits are compared with the threshold's logit, so that nothing is permuted and nothing
    but the candidates gets a sigmoid.

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
        self._logit_thresh = _logit_below(score_thresh)
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
        return [
            self._detect(
                [a.tensor for a in anchors],
                [x[n] for x in logits],
                [x[n] for x in deltas],
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
        self, anchors_R4: Tensor, logits: Tensor, deltas: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes of one level that are worth an NMS.

        Args:
            logits, deltas: (A*K, H, W) and (A*4, H, W).
        """
        channel, row, column = _highest(logits, self._logit_thresh, self.topk_candidates)
        # in float32 whatever the head's precision is, as the NMS
        scores = _sigmoid(logits[channel, row, column].float())
        A, W, K = len(logits) // self.num_classes, logits.shape[2], self.num_classes
        place = row * W + column
        entry = (place * A + channel // K) * K + channel % K  # in the order of the anchors
        # exact where the logit's threshold was only near
        enough = scores > self.score_thresh
        if len(scores) > self.topk_candidates:
            enough &= scores >= scores.topk(self.topk_candidates).values[-1]
        scores, entry = scores[enough], entry[enough]
        # best first, among equals the first anchor: two sorts of a short list
        order = entry.argsort()
        order = order[scores[order].argsort(descending=True, stable=True)]
        order = order[: self.topk_candidates]
        anchor, class_ = entry[order] // K, entry[order] % K
        place, a = anchor // A, anchor % A
        deltas_S4 = deltas.unflatten(0, (A, 4))[a, :, place // W, place % W]
        boxes = self.box2box_transform.apply_deltas(deltas_S4, anchors_R4[anchor])
        return boxes, scores[order], class_


def _sigmoid(x: Tensor) -> Tensor:
    """The same for an entry wherever it stands: torch's vectors and the rest that fills none
    differ in the last bit, so the rest is filled up."""
    return F.pad(x, (0, -len(x) % 64)).sigmoid()[: len(x)]


def _logit_below(score: float) -> float:
    """A logit whose float32 score is surely below ``score``, but nearly."""
    score = min(score, 1.0) * (1 - 1e-6)
    if score <= 0:
        return -math.inf
    x = math.log(score / (1 - score))
    return x - 1e-3 - 1e-5 * abs(x)


def _highest(logits: Tensor, threshold: float, k: int) -> tuple[Tensor, ...]:
    """Coordinates of the entries of (C, H, W) logits above a threshold, in any order; those whose
    score is below that of the k-th highest may be missing.

    The lines' maxima are looked at first: reading is most of the work, few lines have any entry
    above, and the k-th highest maximum is a lower bound of the k-th highest entry.
    """
    dim = 2 if logits.stride(2) == 1 else 0  # along memory
    lines = logits.movedim(dim, 2)
    # float: a 16-bit tensor would be compared with the threshold rounded to 16 bits
    highest = lines.amax(dim=2).float()
    if highest.numel() > k:
        known = torch.where(highest.isnan(), -torch.inf, highest).flatten()
        kth = known.topk(k).values[-1].sigmoid().item()
        threshold = max(threshold, _logit_below(kth))  # with all that score the same
    first, second = torch.where(~(highest <= threshold))  # a NaN hides the rest of its line
    line, third = torch.where(lines[first, second].float() > threshold)
    first, second = first[line], second[line]
    return (first, second, third) if dim == 2 else (third, first, second)
