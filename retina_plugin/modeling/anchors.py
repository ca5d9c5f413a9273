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

__all__ = ["AnchorGenerator", "DetectronAnchorGenerator", "TorchvisionAnchorGenerator"]


class AnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors without GPU synchronisation.

    Detectron2 makes the grid of centres on the host and copies it, which synchronises. Here it is
    made on the device. The anchors are the same to the bit.
    """

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        anchors = []
        steps = self._steps(grid_sizes)
        for (height, width), (dy, dx), cell_A4 in zip(grid_sizes, steps, self.cell_anchors):
            options = {"device": cell_A4.device, "dtype": torch.float32}
            x = torch.arange(self.offset * dx, width * dx, dx, **options)
            y = torch.arange(self.offset * dy, height * dy, dy, **options)
            y, x = (grid.flatten() for grid in torch.meshgrid(y, x, indexing="ij"))
            # (H*W, 4): the shift of each location's anchors
            shifts_P4 = torch.stack((x, y, x, y), dim=1)
            anchors.append((shifts_P4[:, None] + cell_A4).flatten(0, 1))
        return anchors

    def _steps(self, grid_sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Pixels from one location to the next on each level, down and to the right."""
        return [(stride, stride) for stride in self.strides]


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


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(AnchorGenerator):
    """torchvision's anchors, in Detectron2's order of the anchors of a location.

    They differ from Detectron2's in two ways:

    - The corners of the anchors of a location are rounded to whole pixels.
    - Locations are (padded size of the image) // (size of the level) pixels apart. That is less
      than the stride where the size of the level was rounded up: 53 instead of 64 pixels on P6 of
      an image of 320 pixels, which has 6 rows.

    Args:
        sizes, aspect_ratios, strides, offset: Detectron2's. The first level's stride must divide
            the padded size.

    Example:
        In YAML, with torchvision's sizes::

            MODEL:
              ANCHOR_GENERATOR:
                NAME: "TorchvisionAnchorGenerator"
                SIZES: [[32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406],
                        [512, 645, 812]]
    """

    def generate_cell_anchors(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
    ) -> Tensor:
        """(A, 4) anchors around (0, 0), XYXY in pixels: torchvision's to the bit."""
        size_S1 = torch.tensor(sizes, dtype=torch.float32)[:, None]
        height_ratio = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
        width, height = ((ratio * size_S1).flatten() for ratio in (1 / height_ratio, height_ratio))
        return (torch.stack((-width, -height, width, height), dim=1) / 2).round()

    def _steps(self, grid_sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        # Only the features are known here. The first level is not rounded up.
        height, width = (side * self.strides[0] for side in grid_sizes[0])
        return [(height // rows, width // columns) for rows, columns in grid_sizes]
