"""What the parts of the detector pass to each other, and how a part of your own is called.

The detector calls its parts by position. A class or a function with the right arguments is enough:
nothing has to be inherited.
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

    A matcher sees no classes. So it labels as in a problem with one class: 0 is a matched anchor,
    to which the labeler gives the class of its box.

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
                crowds, ``gt_iscrowd``.
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
            predict_boxes: ``predict_boxes(n, anchor_S)`` are the (S, 4) decoded boxes of some
                anchors of image n, XYXY in pixels of the network's input.

        Returns:
            The chosen anchors, none of which may be ignored; each image's loss is divided by their
            number. None stands for every anchor that is not ignored; the loss is then divided by
            ``MODEL.RETINANET.NORMALIZER``, and a kernel may compute it.
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
