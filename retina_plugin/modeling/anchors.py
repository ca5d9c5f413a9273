"""The anchors of every location of every level (section 4, "Anchors")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from torch import Tensor

__all__ = ["AnchorGenerator", "DetectronAnchorGenerator"]


class AnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors without GPU synchronisation.

    Detectron2 makes the grid of centres on the host and copies it, which synchronises. Here it is
    made on the device. The anchors are the same to the bit.
    """

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        anchors = []
        for (height, width), stride, cell_A4 in zip(grid_sizes, self.strides, self.cell_anchors):
            options = {"device": cell_A4.device, "dtype": torch.float32}
            start = self.offset * stride
            x = torch.arange(start, width * stride, stride, **options)
            y = torch.arange(start, height * stride, stride, **options)
            y, x = (grid.flatten() for grid in torch.meshgrid(y, x, indexing="ij"))
            # (H*W, 4): the shift of each location's anchors
            shifts_P4 = torch.stack((x, y, x, y), dim=1)
            anchors.append((shifts_P4[:, None] + cell_A4).flatten(0, 1))
        return anchors


@ANCHOR_GENERATOR_REGISTRY.register()
class DetectronAnchorGenerator(AnchorGenerator):
    """Detectron's anchors, in Detectron2's order of the anchors of a location.

    Detectron rounds the sides of a square of stride x stride pixels that is stretched to an aspect
    ratio r = h / w, and scales the result: w = round(stride / sqrt(r)), h = round(w * r), times
    size / stride. So areas are up to 12.5 % larger or smaller than size^2. Its weights need it.
    (detectron/modeling/generate_anchors.py)

    In YAML, with ``OFFSET`` for its centres in the middle of a cell::

        MODEL:
          ANCHOR_GENERATOR:
            NAME: "DetectronAnchorGenerator"
            OFFSET: 0.5

    Args:
        sizes, aspect_ratios, strides, offset: see Detectron2's ``DefaultAnchorGenerator``.
    """

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        levels = []
        for stride, size, ratio in zip(self.strides, sizes, aspect_ratios):
            ratio_R = torch.tensor(ratio, dtype=torch.float64)
            width_R = (stride**2 / ratio_R).sqrt().round()  # halves to even, as in NumPy
            corner_R2 = torch.stack((width_R, (width_R * ratio_R).round()), dim=1) / 2
            scale_S11 = torch.tensor(size, dtype=torch.float64)[:, None, None] / stride
            corner_A2 = (scale_S11 * corner_R2).flatten(0, 1)
            levels.append(torch.cat((-corner_A2, corner_A2), dim=1).float())
        return BufferList(levels)
