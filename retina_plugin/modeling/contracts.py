"""The interfaces of the detector's parts: what to write to replace one.

A class or a function with the same arguments will do, nothing has to be inherited. The detector
passes the arguments by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from detectron2.structures import Boxes, Instances
from torch import Tensor

from retina_plugin.losses import DenseTargets

__all__ = [
    "BoxCoder",
    "Inference",
    "Labeler",
    "Matcher",
    "Matches",
    "Sample",
    "Sampler",
]


class Matches(NamedTuple):
    """The matches of one image, both (R,)."""

    gt: Tensor  # int64 index of the matched ground-truth box; any number where label is not 0
    label: Tensor  # int8: 0 matched, else BACKGROUND or IGNORED of retina_plugin.losses.targets


class Matcher(Protocol):
    """Matches the anchors of one image to its ground-truth boxes.

    A matcher does not see the classes. So it gives the label 0 to every matched anchor, as if there
    were one class only; the labeler replaces 0 by the class of the box.

    Example:
        Every anchor with an IoU of at least .5 is positive, no anchor is ignored::

            def match_above_half(gt_boxes_G4, anchors_R4):
                iou_GR = torchvision.ops.box_iou(gt_boxes_G4, anchors_R4)
                none_1R = iou_GR.new_zeros(1, len(anchors_R4))  # there may be no boxes
                iou_R, gt_R = torch.cat([iou_GR, none_1R]).max(dim=0)
                return gt_R, torch.where(iou_R >= 0.5, 0, BACKGROUND)
    """

    def __call__(self, gt_boxes_G4: Tensor, anchors_R4: Tensor, /) -> tuple[Tensor, Tensor]:
        """Match one image.

        Args:
            gt_boxes_G4: objects, XYXY in pixels of the network's input, without crowds; G may be 0.
            anchors_R4: anchors of all levels in the same frame.

        Returns:
            :class:`Matches`, or a tuple with the same two tensors. Any integer type will do.
        """
        ...


class Labeler(Protocol):
    """Assigns a label and a ground-truth box to every anchor of a batch."""

    def __call__(self, anchors_R4: Tensor, gt_instances: Sequence[Instances], /) -> DenseTargets:
        """Label a batch.

        Args:
            anchors_R4: anchors of all levels, XYXY in pixels of the network's input.
            gt_instances: N Instances with ``gt_boxes``, ``gt_classes`` and, if the mapper keeps
                crowd boxes, ``gt_iscrowd`` (bool, on the host). Crowd boxes are not objects.
        """
        ...


class Sample(NamedTuple):
    """The sampled anchors of a batch; both (S,) int64."""

    image: Tensor  # in [0, N)
    anchor: Tensor  # in [0, R)


class Sampler(Protocol):
    """Chooses the anchors that the classification loss sees.

    Entries of ``ANCHOR_SAMPLER_REGISTRY`` are classes whose instances are called like this.
    """

    def __call__(
        self,
        targets: DenseTargets,
        score_anchors: Callable[[], Tensor],
        predict_boxes: Callable[[int, Tensor], Tensor],
        /,
    ) -> Sample | None:
        """Choose anchors of a batch.

        Args:
            targets: labels of the batch.
            score_anchors: ``score_anchors()`` is the (N, R) classification loss of every anchor,
                summed over classes; -inf where it is ignored.
            predict_boxes: ``predict_boxes(n, anchor_S)`` are the (S, 4) predicted boxes of the
                given anchors of image n, XYXY in pixels of the network's input.

        Returns:
            The chosen anchors, or None.

            - A ``Sample`` must not contain ignored anchors. The loss of each image is the mean over
              its sampled anchors.
            - None means every anchor that is not ignored. The loss is the sum over them, divided
              as ``MODEL.RETINANET.NORMALIZER`` says; ``MODEL.RETINANET.LOSS_BACKEND`` computes it.
        """
        ...


class Inference(Protocol):
    """Turns the head's output into detections."""

    def __call__(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        /,
    ) -> list[Instances]:
        """Detect in a batch.

        Args:
            anchors: per level (Hi*Wi*A, 4).
            logits, deltas: per level (N, A*K, Hi, Wi) and (N, A*4, Hi, Wi).
            image_sizes: N pairs (height, width) in pixels, without padding.

        Returns:
            N Instances with ``pred_boxes`` (XYXY in pixels of the network's input), ``scores`` and
            ``pred_classes``.
        """
        ...


class BoxCoder(Protocol):
    """Encodes boxes relative to anchors: Detectron2's ``Box2BoxTransform`` or one like it."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """(P, 4) deltas that lead from anchors to boxes, both (P, 4) XYXY."""
        ...

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(P, 4) boxes from deltas and anchors, both (P, 4)."""
        ...
