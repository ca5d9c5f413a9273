"""The anchors of every location of every level (section 4, "Anchors")."""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor

__all__ = ["AnchorGenerator"]


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
