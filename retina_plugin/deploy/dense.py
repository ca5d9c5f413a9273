"""The detector as a function of tensors alone, which can be exported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from torch import Tensor, nn

from retina_plugin.errors import ConfigError, check_choice
from retina_plugin.modeling import FocalRetinaNet
from retina_plugin.modeling.anchors import (
    AnchorGenerator,
    DetectronAnchorGenerator,
    TorchvisionAnchorGenerator,
)
from retina_plugin.modeling.box_regression import BoxTransform
from retina_plugin.modeling.inference import DenseInference

from .ops import nms_keep

__all__ = ["STAGES", "DenseModel"]

# How far a file goes: detections, all decoded boxes with their scores, or the head's output.
STAGES = ("nms", "boxes", "head")

# Their anchors are a grid of shifts plus the anchors of one location, which this file computes.
_GRIDS = (
    DefaultAnchorGenerator,
    AnchorGenerator,
    DetectronAnchorGenerator,
    TorchvisionAnchorGenerator,
)


class DenseModel(nn.Module):
    """A :class:`.FocalRetinaNet` that takes one tensor of images and gives tensors.

    With the stage "nms" the detections are those of the detector to the bit, for any size and
    number of images. Three things are done otherwise, so that no shape depends on a value:

    - The ``topk_candidates`` best logits of each level are taken, and those below the threshold
      get the score 0, where the detector compares with the threshold first.
    - Anchors are computed for these candidates only.
    - There are always D detections. Those that are missing have the score 0, the class -1 and a
      box of zeros.

    Args:
        model: in evaluation mode, in float32.
        stage: "nms", "boxes" or "head", see :meth:`forward`.

    Raises:
        ConfigError: a part of the model is not known here, so it would be exported wrongly.

    Example::

        dense = DenseModel(predictor_model.eval())
        boxes, scores, classes = dense(torch.rand(2, 3, 480, 640) * 255)
    """

    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor

    def __init__(self, model: FocalRetinaNet, stage: str = "nms") -> None:
        super().__init__()
        check_choice("--output-stage", stage, STAGES)
        inference = _known_parts(model, stage)
        self.stage = stage
        self.backbone, self.head = model.backbone, model.head
        self.levels = tuple(model.head_in_features)
        constraints = model.backbone.padding_constraints
        self.divisibility = constraints.get("size_divisibility", model.backbone.size_divisibility)
        self.square_size = constraints.get("square_size", 0)
        self.register_buffer("pixel_mean", model.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", model.pixel_std.detach().clone())
        if stage == "head":
            return
        assert inference is not None
        anchors: Any = model.anchor_generator
        box_coder: Any = inference.box2box_transform
        self.cell_anchors = BufferList([cell.detach().clone() for cell in anchors.cell_anchors])
        self.strides, self.offset = tuple(anchors.strides), float(anchors.offset)
        self.steps_of_sizes = isinstance(anchors, TorchvisionAnchorGenerator)
        self.box_weights = tuple(box_coder.weights)
        self.scale_clamp = box_coder.scale_clamp
        self.num_classes = model.num_classes
        self.score_thresh, self.nms_thresh = inference.score_thresh, inference.nms_thresh
        self.topk, self.max_detections = inference.topk_candidates, inference.max_detections
        self.boxes_outside = inference.boxes_outside

    @property
    def output_names(self) -> list[str]:
        """Of the tensors that :meth:`forward` returns, in their order."""
        if self.stage == "head":
            return [f"{what}_{name}" for what in ("logits", "deltas") for name in self.levels]
        return ["boxes", "scores"] + (["classes"] if self.stage == "nms" else [])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect in N images of one size.

        Args:
            image: (N, 3, H, W) float32, pixels 0 to 255 in the model's channel order.

        Returns:
            nms: boxes (N, D, 4) XYXY in pixels of ``image``, clipped to it; scores (N, D),
            decreasing; classes (N, D) int64. D is the model's ``max_detections``.

            boxes: decoded boxes (N, R, 4), which are not clipped, and probabilities (N, R, K) of
            all R anchors: level by level, row by row, the anchors of a location together.

            head: logits (N, A*K, Hi, Wi) of every level, then deltas (N, A*4, Hi, Wi).
        """
        height, width = image.shape[-2:]
        features = self.backbone(self._padded((image - self.pixel_mean) / self.pixel_std))
        logits, deltas = self.head([features[name] for name in self.levels])
        if self.stage == "head":
            return (*logits, *deltas)
        sizes = [x.shape[-2:] for x in logits]
        steps = self._steps(sizes)
        per_level = self._all_boxes if self.stage == "boxes" else self._candidates
        found = [per_level(*level) for level in zip(self.cell_anchors, logits, deltas, steps)]
        parts = tuple(torch.cat(part, dim=1) for part in zip(*found))
        return parts if self.stage == "boxes" else self._detections(height, width, *parts)

    def _padded(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if self.square_size:
            bottom, right = self.square_size - height, self.square_size - width
        elif self.divisibility > 1:
            # not -height % d: that does not convert with a symbolic height
            d = self.divisibility
            bottom, right = ((x + d - 1) // d * d - x for x in (height, width))
        else:
            return image
        return F.pad(image, (0, right, 0, bottom))

    def _steps(self, sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Pixels from one location to the next on each level, down and to the right."""
        if not self.steps_of_sizes:
            return [(stride, stride) for stride in self.strides]
        height, width = (side * self.strides[0] for side in sizes[0])
        return [(height // rows, width // columns) for rows, columns in sizes]

    def _candidates(
        self, cell_A4: Tensor, logits: Tensor, deltas: Tensor, step: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, k, 4), logits (N, k) and classes (N, k) of the best of one level."""
        H, W = logits.shape[2:]
        top, index = _top(logits, self.topk)
        channel = index // (H * W)
        location = index - channel * (H * W)  # not %, see above
        anchor = channel // self.num_classes
        anchors = self._anchors_at(cell_A4, anchor, location, W, step)
        first = (anchor * 4 * (H * W) + location)[:, :, None]
        entry = first + torch.arange(4, device=logits.device) * (H * W)
        deltas_Nk4 = deltas.flatten(1).gather(1, entry.flatten(1)).unflatten(1, (-1, 4))
        boxes = self._decode(deltas_Nk4, anchors)
        return boxes, top, channel - anchor * self.num_classes

    def _all_boxes(
        self, cell_A4: Tensor, logits: Tensor, deltas: Tensor, step: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """All boxes (N, H*W*A, 4) and probabilities (N, H*W*A, K) of one level."""
        H, W = logits.shape[2:]
        A = len(cell_A4)
        location = torch.arange(H * W, device=logits.device)[:, None]
        anchor = torch.arange(A, device=logits.device)
        anchors_R4 = self._anchors_at(cell_A4, anchor, location, W, step).flatten(0, 1)
        # (N, A*C, H, W) -> (N, H*W*A, C)
        deltas_NR4, logits_NRK = (
            x.unflatten(1, (A, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in (deltas, logits)
        )
        return self._decode(deltas_NR4, anchors_R4[None]), logits_NRK.sigmoid()

    def _anchors_at(
        self, cell_A4: Tensor, anchor: Tensor, location: Tensor, W: int, step: tuple[int, int]
    ) -> Tensor:
        """(..., 4) anchors of some locations (row * W + column): those of the generator."""
        row = location // W
        dy, dx = step
        y = (row * dy).float() + self.offset * dy
        x = ((location - row * W) * dx).float() + self.offset * dx
        shift = torch.stack((x, y, x, y), dim=-1)
        return shift + cell_A4[anchor]

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """``Box2BoxTransform.apply_deltas`` of (..., 4) tensors, operation by operation."""
        widths, heights = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
        center_x, center_y = anchors[..., 0] + 0.5 * widths, anchors[..., 1] + 0.5 * heights
        wx, wy, ww, wh = self.box_weights
        dx, dy, dw, dh = deltas.unbind(-1)
        x, y = dx / wx * widths + center_x, dy / wy * heights + center_y
        w = (dw / ww).clamp(max=self.scale_clamp).exp() * widths
        h = (dh / wh).clamp(max=self.scale_clamp).exp() * heights
        return torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), dim=-1)

    def _detections(
        self, height: int, width: int, boxes: Tensor, logits: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A small image has fewer candidates than D: those that are added get the score 0. With 64
        # of them at least, no candidate is in the rest that fills no vector register, of which
        # torch computes the sigmoid otherwise, down to the last bit.
        D = self.max_detections
        more = max(D, 64)
        boxes, classes = F.pad(boxes, (0, 0, 0, more)), F.pad(classes, (0, more))
        scores = F.pad(logits, (0, more), value=-math.inf).sigmoid()
        # A sum of NaN or inf is not less than inf. Such a box is no detection.
        finite = boxes.abs().sum(dim=-1) < math.inf
        boxes = torch.where(finite[..., None], boxes, 0.0)
        scores = torch.where(finite & (scores > self.score_thresh), scores, 0.0)
        clipped = _clip(boxes, height, width)
        if self.boxes_outside == "clip":
            boxes = clipped
        keep = nms_keep(boxes, scores, classes, self.num_classes, self.nms_thresh)
        if self.boxes_outside == "drop":
            keep &= _have_area(clipped)
        scores = torch.where(keep, scores, 0.0)
        boxes, scores, classes = _best(clipped, scores, classes, D)
        if self.boxes_outside == "keep":  # removed only now, as in `detector_postprocess`
            scores = torch.where(_have_area(boxes), scores, 0.0)
            boxes, scores, classes = _best(boxes, scores, classes, D)
        found = scores > 0
        return torch.where(found[..., None], boxes, 0.0), scores, torch.where(found, classes, -1)


def _best(boxes: Tensor, scores: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the candidates of each image the k with the highest scores, by decreasing score."""
    top, best = scores.topk(k, dim=1)
    return boxes.gather(1, best[..., None].expand(-1, -1, 4)), top, classes.gather(1, best)


def _have_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of (N, C, H, W) logits, or all: values and flat indices (N, k)."""
    flat = logits.flatten(1)
    return flat.topk(torch.sym_min(k, flat.shape[1]), dim=1)


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    x1, x2 = (x.clamp(min=0).clamp(max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0).clamp(max=height) for y in (y1, y2))
    return torch.stack((x1, y1, x2, y2), dim=-1)


def _known_parts(model: nn.Module, stage: str) -> DenseInference | None:
    """Check that the export does what the model does; the model's inference.

    Raises:
        ConfigError: a part is of the user's own, or an option has no form in tensors.
    """
    if not isinstance(model, FocalRetinaNet):
        raise ConfigError(
            f"retina export takes a FocalRetinaNet, not {type(model).__name__}: set "
            "MODEL.META_ARCHITECTURE FocalRetinaNet (it loads the same weights)"
        )
    if stage == "head":
        return None
    otherwise = "export the stage head, and do the rest in your program"
    if type(model.anchor_generator) not in _GRIDS:
        name = type(model.anchor_generator).__name__
        raise ConfigError(f"the anchors of {name} cannot be exported: {otherwise}")
    if not isinstance(model.inference, DenseInference):
        name = type(model.inference).__name__
        raise ConfigError(f"the inference {name} cannot be exported: {otherwise}")
    if type(model.inference.box2box_transform) is not BoxTransform:
        name = type(model.inference.box2box_transform).__name__
        raise ConfigError(f"boxes that {name} decodes cannot be exported: {otherwise}")
    if stage == "nms" and model.inference.merge is not None:
        raise ConfigError(
            "only NMS by class can be exported: set TEST.MERGE nms, or export the stage boxes and "
            "merge them in your program"
        )
    return model.inference
