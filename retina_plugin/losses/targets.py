"""Training targets: a label and an assigned box for every anchor."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "DenseTargets", "LabelMap"]

# The labels beside the classes [0, K). Negative: `label >= 0` is a positive anchor everywhere.
BACKGROUND, IGNORED = -1, -2


class LabelMap(NamedTuple):
    """The labels of a level, in memory like the level's logits (N, A*K, H, W)."""

    labels_NAHW: Tensor  # int16
    channels_last: bool  # memory order of labels and logits: NHWC, otherwise NCHW


@dataclass
class DenseTargets:
    """The label of each anchor of a batch and the box assigned to it.

    N images of R anchors, in Detectron2's order (level, row, column, anchor of the location). No
    shape depends on the labels, so making targets does not synchronise with the GPU.
    """

    label_NR: Tensor  # int16: the class in [0, K) of a positive anchor, BACKGROUND or IGNORED
    gt_NR: Tensor  # int64 in [0, G], index of the assigned box; arbitrary unless positive
    gt_boxes_G4: Tensor  # the boxes of all images, XYXY in pixels of the network's input

    @property
    def num_images(self) -> int:
        return len(self.label_NR)

    def num_positives_N(self) -> Tensor:
        """(N,) int64: the positive anchors of each image."""
        return (self.label_NR >= 0).sum(dim=1)

    def label_maps(self, logits: Sequence[Tensor], num_classes: int) -> Iterator[LabelMap]:
        """The labels of each level in the shape and the memory layout of its logits.

        Whether a level is channels_last is read from its logits here, once, for every backend.

        Args:
            logits: per level (N, A*K, H, W).
            num_classes: K.

        Raises:
            ValueError: the logits have another number of anchors, or a label is neither a class,
                nor BACKGROUND, nor IGNORED. On a GPU the latter is a device-side assertion, to
                avoid a synchronisation. (A kernel would write out of bounds with such a label.)
        """
        low, high = self.label_NR.aminmax()
        inside = (low >= IGNORED) & (high < num_classes)
        message = (
            f"a label of DenseTargets is neither in [0, {num_classes}), "
            "MODEL.RETINANET.NUM_CLASSES, nor BACKGROUND or IGNORED"
        )
        if inside.device.type != "cpu":
            torch._assert_async(inside, message)
        elif not inside:
            raise ValueError(message)
        counts = [x[0].numel() // num_classes for x in logits]
        if sum(counts) != self.label_NR.shape[1]:
            raise ValueError(
                f"logits of {sum(counts)} anchors, but targets of {self.label_NR.shape[1]}"
            )
        for x, labels in zip(logits, self.label_NR.split(counts, dim=1)):
            N, _, H, W = x.shape
            labels_NAHW = labels.reshape(N, H, W, -1).permute(0, 3, 1, 2)
            channels_last = _is_channels_last(x)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            yield LabelMap(labels_NAHW.contiguous(memory_format=layout), channels_last)

    # Indices of the positive and the ignored anchors, for minibatches and for the CPU, where
    # indexing is faster than masking. On a GPU they synchronise: their length has to be known.

    @functools.cached_property
    def _positive(self) -> tuple[Tensor, ...]:
        return torch.where(self.label_NR >= 0)

    @functools.cached_property
    def _ignored(self) -> tuple[Tensor, ...]:
        return torch.where(self.label_NR == IGNORED)

    @property
    def positive_image(self) -> Tensor:
        """(P,) int64 in [0, N), ascending."""
        return self._positive[0]

    @property
    def positive_anchor(self) -> Tensor:
        """(P,) int64 in [0, R), ascending within an image."""
        return self._positive[1]

    @functools.cached_property
    def positive_class(self) -> Tensor:
        """(P,) int64 in [0, K)."""
        return self.label_NR[self._positive].long()

    @functools.cached_property
    def positive_gt_box(self) -> Tensor:
        """(P, 4) the assigned boxes."""
        return self.gt_boxes_G4[self.gt_NR[self._positive]]

    @property
    def ignored_image(self) -> Tensor:
        """(M,) int64 in [0, N), ascending."""
        return self._ignored[0]

    @property
    def ignored_anchor(self) -> Tensor:
        """(M,) int64 in [0, R), ascending within an image."""
        return self._ignored[1]


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position are neighbours in memory (NHWC, or a slice of it).

    A tensor with one channel or one position is in both orders. It counts as contiguous, and its
    labels are in both orders too.
    """
    # the stride of a dimension of size 1 is arbitrary
    position_stride = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return not x.is_contiguous() and x.stride(1) < position_stride
