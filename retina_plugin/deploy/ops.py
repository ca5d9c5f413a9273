"""Non-maximum suppression as one operator of a fixed output shape, and its form in ONNX.

Everything else of the detector has shapes that follow from the image's, so this is the only place
where exported code would depend on the values. It is kept inside the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import batched_nms
from torch import Tensor

__all__ = ["nms_keep", "onnx_translations"]


@torch.library.custom_op("retina_plugin::nms_keep", mutates_args=())
def nms_keep(
    boxes_NS4: Tensor, scores_NS: Tensor, classes_NS: Tensor, num_classes: int, iou_thresh: float
) -> Tensor:
    """Which candidates NMS by class keeps: a bool mask (N, S).

    A program that was saved by ``torch.export`` finds it once ``retina_plugin.deploy`` is imported.

    Args:
        boxes_NS4: XYXY in pixels, finite.
        scores_NS: candidates with a score of 0 are never kept.
        classes_NS: int64, 0 to K - 1.
        num_classes: K.
        iou_thresh: of two boxes of a class with a greater IoU, the one with the lower score is
            dropped.
    """
    keep = torch.zeros_like(scores_NS, dtype=torch.bool)
    for boxes, scores, classes, kept in zip(boxes_NS4, scores_NS, classes_NS, keep):
        (present,) = torch.where(scores > 0)
        chosen = batched_nms(boxes[present], scores[present], classes[present], iou_thresh)
        kept[present[chosen]] = True
    return keep


@nms_keep.register_fake
def _(
    boxes_NS4: Tensor, scores_NS: Tensor, classes_NS: Tensor, num_classes: int, iou_thresh: float
) -> Tensor:
    return torch.empty_like(scores_NS, dtype=torch.bool)


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """``custom_translation_table`` of ``torch.onnx.export``: the operator as ONNX's own ones."""
    from onnxscript import opset18

    op: Any = opset18  # its types know one value a constant

    def translate(
        boxes: Any, scores: Any, classes: Any, num_classes: int, iou_thresh: float
    ) -> Any:
        # NonMaxSuppression takes the scores (N, K, S) of every class: 0 but in that of a candidate.
        one = op.Constant(value_ints=[1])
        every = op.Constant(value_ints=list(range(num_classes)))
        of_class = op.Equal(
            op.Unsqueeze(classes, one),
            op.Reshape(every, op.Constant(value_ints=[1, num_classes, 1])),
        )
        zero = op.Constant(value_float=0.0)
        scores_NKS = op.Where(of_class, op.Unsqueeze(scores, one), zero)
        chosen = op.NonMaxSuppression(  # rows of (image, class, candidate)
            boxes,
            scores_NKS,
            op.Shape(scores, start=1, end=2),  # as many of a class as there are
            op.Constant(value_floats=[iou_thresh]),
            op.Constant(value_floats=[0.0]),  # only scores above it
        )
        place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(place, start=0, end=1))
        kept = op.ScatterND(op.ConstantOfShape(op.Shape(scores)), place, ones)
        return op.Greater(kept, zero)

    return {torch.ops.retina_plugin.nms_keep.default: translate}
