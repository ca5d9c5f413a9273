"""From dense predictions to detections (section 4.1, "Inference")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms  # NMS by class, in float32
from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_plugin.config import KEYS
from retina_plugin.errors import check_choice

from .contracts import BoxCoder

__all__ = ["DenseInference", "rescale_detections"]

_BOXES_OUTSIDE = "MODEL.RETINANET.BOXES_OUTSIDE_TEST"


class DenseInference:
    """Score threshold and top-k on each level, decoding, then NMS by class over all levels.

    With ``boxes_outside="keep"`` detections and their order equal those of Detectron2's
    ``RetinaNet`` with the same settings. Only the order of equal scores may differ: here the first
    anchor comes first, there ``topk`` decides. The raw logits are compared with the logit of the
    threshold, so nothing is permuted, and the sigmoid is computed for the candidates only.

    The smaller images of a batch are padded to the size of the others, and the network detects in
    the padding too. There are three ways to treat boxes outside an image:

    - "keep": Detectron2's. They take the places of others among the ``topk_candidates`` and the
      ``max_detections``, and ``detector_postprocess`` removes them afterwards.
    - "drop": locations that an image alone would not have give no candidates, and of the boxes that
      pass the NMS those outside the image do not count. So an image of a batch has the candidates
      of the image alone, whose detections are Detectron2's and then those that boxes outside kept
      out.
    - "clip": torchvision's. Boxes are clipped before the NMS, and those outside stay, without area.

    Args:
        num_classes: K.
        box2box_transform: decodes deltas (``apply_deltas``).
        score_thresh: detections need a score above it (.05).
        topk_candidates: predictions of a level that are decoded (1000).
        nms_thresh: IoU above which NMS drops the lower-scored of two boxes of a class (.5).
        max_detections: most detections of an image (100, COCO's limit).
        merge: (boxes, scores, classes) of the candidates -> those of the detections, by decreasing
            score. None: NMS by class with ``nms_thresh``.
        boxes_outside: "keep", "drop" or "clip", see above.
        strides: of each level in pixels, for "drop". Without them all locations give candidates,
            which is right where an image alone is padded as in any batch.
        size_divisibility: the sides of an image alone are padded to multiples of it (pixels).

    Raises:
        ConfigError: an unknown ``boxes_outside``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        box2box_transform: BoxCoder,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.5,
        max_detections: int = 100,
        merge: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
        boxes_outside: str = "keep",
        strides: Sequence[int] = (),
        size_divisibility: int = 0,
    ) -> None:
        check_choice(_BOXES_OUTSIDE, boxes_outside, KEYS[_BOXES_OUTSIDE].choices)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.score_thresh = score_thresh
        self._logit_thresh = _logit_below(score_thresh)
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.merge = merge
        self.boxes_outside = boxes_outside
        self.strides = tuple(strides)
        self.size_divisibility = max(1, size_divisibility)

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
            N Instances with ``pred_boxes`` (XYXY in pixels of the network's input; clipped to the
            image with "clip" only), ``scores`` (probabilities, decreasing) and ``pred_classes``.
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
        sizes = self._level_sizes(image_size, logits)
        levels = [self._candidates(*level) for level in zip(anchors, logits, deltas, sizes)]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*levels))
        # A delta of NaN or inf is no detection. It would also end the postprocessing with an
        # error, and hide other boxes from the NMS, which moves classes apart by the largest one.
        finite = boxes.isfinite().all(dim=1)
        boxes, scores, classes = boxes[finite], scores[finite], classes[finite]
        if self.boxes_outside == "clip":
            boxes = _clip(boxes, image_size)
        boxes, scores, classes = (self.merge or self._nms)(boxes, scores, classes)
        if self.boxes_outside == "drop":
            x1, y1, x2, y2 = _clip(boxes, image_size).unbind(1)
            inside = (x1 < x2) & (y1 < y2)
            boxes, scores, classes = boxes[inside], scores[inside], classes[inside]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[: self.max_detections]),
            scores=scores[: self.max_detections],
            pred_classes=classes[: self.max_detections],
        )

    def _nms(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)
        return boxes[keep], scores[keep], classes[keep]

    def _level_sizes(
        self, image_size: tuple[int, int], logits: Sequence[Tensor]
    ) -> list[tuple[int, int]]:
        """Rows and columns of each level that give candidates."""
        if self.boxes_outside != "drop" or not self.strides:
            return [(x.shape[1], x.shape[2]) for x in logits]
        height, width = image_size
        height, width = (
            _divide_up(side, self.size_divisibility) * self.size_divisibility
            for side in (height, width)
        )
        return [(_divide_up(height, stride), _divide_up(width, stride)) for stride in self.strides]

    def _candidates(
        self, anchors_R4: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes of one level above the threshold, the ``topk_candidates`` best.

        Args:
            logits, deltas: (A*K, H, W) and (A*4, H, W) of one image.
            size: only the first rows and columns give candidates.
        """
        if torch.jit.is_tracing():
            return self._traceable_candidates(anchors_R4, logits, deltas, size)
        channel, row, column = _select_candidates(
            logits[:, : size[0], : size[1]], self._logit_thresh, self.topk_candidates
        )
        scores = _sigmoid(logits[channel, row, column].float())  # float32, as in the NMS
        A, W, K = len(logits) // self.num_classes, logits.shape[2], self.num_classes
        location = row * W + column
        entry = (location * A + channel // K) * K + channel % K  # index of (anchor, class)
        # the threshold on the logits was a little too low, this one is exact
        keep = scores > self.score_thresh
        if len(scores) > self.topk_candidates:
            keep &= scores >= scores.topk(self.topk_candidates).values[-1]
        scores, entry = scores[keep], entry[keep]
        # highest score first; of equal scores the first anchor, because the second sort is stable
        order = entry.argsort()
        order = order[scores[order].argsort(descending=True, stable=True)]
        order = order[: self.topk_candidates]
        anchor, class_ = entry[order] // K, entry[order] % K
        location, a = anchor // A, anchor % A
        deltas_S4 = deltas.unflatten(0, (A, 4))[a, :, location // W, location % W]
        boxes = self.box2box_transform.apply_deltas(deltas_S4, anchors_R4[anchor])
        return boxes, scores[order], class_

    def _traceable_candidates(
        self, anchors_R4: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with operations that ``torch.jit.trace`` records for any size of the image.

        They are those of Detectron2's ``_decode_per_level_predictions``, which compare all scores.
        Of equal scores ``topk`` decides which comes first.
        """
        H, W = logits.shape[1:]

        def rows(predictions: Tensor, columns: int) -> Tensor:
            """(A*C, H, W) -> (H'*W'*A, C)"""
            inside = predictions.view(-1, columns, H, W)[:, :, : size[0], : size[1]]
            return inside.permute(2, 3, 0, 1).reshape(-1, columns)

        scores_RK = rows(logits, self.num_classes).float().sigmoid()
        anchors_R4 = anchors_R4.view(H, W, -1, 4)[: size[0], : size[1]].reshape(-1, 4)
        above = scores_RK > self.score_thresh
        scores, place = scores_RK[above], above.nonzero()
        k: Any = torch.as_tensor(scores.shape[0])  # a tensor under the tracer
        k = k.clamp(max=self.topk_candidates)
        scores, best = scores.topk(k)
        anchor, class_ = place[best].unbind(dim=1)
        deltas_R4 = rows(deltas, 4)
        boxes = self.box2box_transform.apply_deltas(deltas_R4[anchor], anchors_R4[anchor])
        return boxes, scores, class_


def rescale_detections(detections: Instances, height: int, width: int) -> Instances:
    """Detections in an image of another size; nothing is clipped or removed, as in torchvision.

    Detectron2's ``detector_postprocess`` clips the boxes again and removes those without area.

    Args:
        detections: ``pred_boxes`` XYXY in pixels of an image of ``detections.image_size``.
        height, width: of the image that the new boxes are in (pixels).
    """
    old_height, old_width = detections.image_size
    boxes = detections.pred_boxes.clone()
    boxes.scale(width / old_width, height / old_height)
    size = (height, width)
    if isinstance(height, Tensor):  # under torch.jit.trace
        size = torch.stack((height, width))
    return Instances(size, **{**detections.get_fields(), "pred_boxes": boxes})


def _divide_up(a: int, b: int) -> int:
    return (a + b - 1) // b  # not -(-a // b): ONNX divides negative numbers otherwise


def _clip(boxes_S4: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The part of each box inside an image (height, width); without area if it lies outside."""
    height, width = image_size
    x1, y1, x2, y2 = boxes_S4.unbind(1)
    return torch.stack(
        (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=1
    )


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid whose result does not depend on the position of an entry.

    Torch computes the entries that fill no vector register in another way, which may differ in the
    last bit. Padding to whole registers avoids that.
    """
    return F.pad(x, (0, -len(x) % 64)).sigmoid()[: len(x)]


def _logit_below(score: float) -> float:
    """A logit whose float32 score is certainly below ``score``, but close to it."""
    score = min(score, 1.0) * (1 - 1e-6)
    if score <= 0:
        return -math.inf
    x = math.log(score / (1 - score))
    return x - 1e-3 - 1e-5 * abs(x)


def _select_candidates(logits: Tensor, threshold: float, k: int) -> tuple[Tensor, ...]:
    """Coordinates of the entries of (C, H, W) logits above a threshold, in any order.

    Entries with a score below the k-th highest may be missing. The maximum of each line of memory
    is computed first, because few lines have an entry above the threshold. The k-th highest maximum
    is a lower bound of the k-th highest entry, so it may raise the threshold.
    """
    dim = 2 if logits.stride(2) == 1 else 0  # a line runs along the dimension of stride 1
    lines = logits.movedim(dim, 2)
    # float: comparing 16-bit logits would round the threshold to 16 bits
    highest = lines.amax(dim=2).float()
    if highest.numel() > k:
        numbers = torch.where(highest.isnan(), -torch.inf, highest).flatten()
        kth = numbers.topk(k).values[-1].sigmoid().item()
        threshold = max(threshold, _logit_below(kth))  # below, to keep all entries of equal score
    # ~(<=) is True for NaN: a line with a NaN may have other entries above the threshold
    first, second = torch.where(~(highest <= threshold))
    line, third = torch.where(lines[first, second].float() > threshold)
    first, second = first[line], second[line]
    return (first, second, third) if dim == 2 else (third, first, second)
