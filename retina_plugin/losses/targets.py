"""What the anchors of a batch shall predict."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BACKGROUND", "IGNORED", "DenseTargets"]

# labels beside the classes
BACKGROUND, IGNORED = -1, -2


@dataclass
class DenseTargets:
    """The label of each anchor of a batch and the box assigned to it.

    R anchors an image, in Detectron2's order (level, row, column, anchor of the location). The size
    of no field depends on the labels, so that nothing waits for an accelerator to know it.
    """

    label_NR: Tensor  # int16: the class in [0, K) of a positive, BACKGROUND or IGNORED
    gt_NR: Tensor  # int64 in [0, G], index into the boxes; means something for positives only
    gt_boxes_G4: Tensor  # those of all images, XYXY in pixels of the network's input

    @property
    def num_images(self) -> int:
        return len(self.label_NR)

    def num_positives_N(self) -> Tensor:
        """(N,) int64: the anchors of each image that are assigned to a ground-truth box."""
        return (self.label_NR >= 0).sum(dim=1)

    def label_maps(self, logits: Sequence[Tensor], num_classes: int) -> Iterator[Tensor]:
        """Per level the labels as (N, A, H, W), in memory as logits of (N, A*K, H, W) are.

        Raises:
            ValueError: logits of another number of anchors; a label that is none (on an accelerator
                an assertion of the device, for kernels would write elsewhere).
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
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            yield labels_NAHW.contiguous(memory_format=layout)

    # The lists of the few that are not background: for minibatches, and for the CPU, where indices
    # are faster than masks. To make one waits for an accelerator: its length is not known before.

    @functools.cached_property
    def _positive(self) -> tuple[Tensor, ...]:
        return torch.where(self.label_NR >= 0)

    @functools.cached_property
    def _ignored(self) -> tuple[Tensor, ...]:
        return torch.where(self.label_NR == IGNORED)

    @property
    def positive_image(self) -> Tensor:
        """(P,) int64 in [0, N), rising."""
        return self._positive[0]

    @property
    def positive_anchor(self) -> Tensor:
        """(P,) int64 in [0, R), rising in an image."""
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
        """(M,) int64 in [0, N), rising."""
        return self._ignored[0]

    @property
    def ignored_anchor(self) -> Tensor:
        """(M,) int64 in [0, R), rising in an image."""
        return self._ignored[1]
