"""How well anchors can cover ground truth: the best IoU of every box, in closed form.

The anchors of a level are the same few shapes at every location of a grid. IoU grows with the
overlap, and the overlap is a product of one factor of x and one of y. Each factor is greatest where
the centres are nearest. So for a box and a shape the best location is known, and a box is compared
with some dozen anchors instead of 200,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import Tensor, nn

from retina_plugin.errors import ConfigError

from .model import build_without_memory

__all__ = ["AnchorGrid"]

_CHUNK = 4096  # boxes at a time: their temporaries stay in the cache of a core
_BOX_NUMBERS = 4


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of all levels as shapes on grids.

    Args:
        names: the L levels ("p3").
        cells: per level (A, 4), the anchors of the first location, XYXY in pixels; float64.
        steps: per level (x, y), pixels from one location to the next.
        strides: per level, pixels of the input for one of the feature map.
        divisibility, square: the backbone's padding (``size_divisibility``, ``square_size``).
        generator: the anchor generator itself.
    """

    names: tuple[str, ...]
    cells: tuple[np.ndarray, ...]
    steps: tuple[tuple[float, float], ...]
    strides: tuple[int, ...]
    divisibility: int
    square: int
    generator: nn.Module

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> AnchorGrid:
        """The anchors that a config's model has.

        The backbone is built for its strides, without memory where that is possible; the anchor
        generator is built as the model builds it.

        Raises:
            ConfigError: ``IN_FEATURES`` names a feature that the backbone does not have, or the
                anchor generator's anchors are not the same boxes at every location.
        """
        backbone = build_without_memory(lambda: build_backbone(cfg))
        shapes = backbone.output_shape()
        names = tuple(cfg.MODEL.RETINANET.IN_FEATURES)
        for name in names:
            if name not in shapes:
                raise ConfigError(
                    f"MODEL.RETINANET.IN_FEATURES: the backbone has no feature '{name}'; "
                    f"known: {', '.join(shapes)}"
                )
        constraints = backbone.padding_constraints
        return cls.from_generator(
            build_anchor_generator(cfg, [shapes[name] for name in names]),
            names,
            tuple(int(shapes[name].stride) for name in names),
            constraints.get("size_divisibility", backbone.size_divisibility),
            constraints.get("square_size", 0),
        )

    @classmethod
    def from_generator(
        cls,
        generator: nn.Module,
        names: tuple[str, ...],
        strides: tuple[int, ...],
        divisibility: int,
        square: int = 0,
    ) -> AnchorGrid:
        """Ask a generator for the anchors of a small image, which tell shapes and steps."""
        # 2 x 2 locations on the last level, and no level with a size that was rounded up
        sides = [max(2, 2 * math.lcm(*strides) // stride) for stride in strides]
        features = [torch.empty(1, 1, side, side) for side in sides]
        cells, steps = [], []
        for side, boxes in zip(sides, generator(features)):
            anchors = boxes.tensor.double().numpy()
            if anchors.shape[1] != _BOX_NUMBERS or len(anchors) % side**2:
                raise ConfigError(
                    f"MODEL.ANCHOR_GENERATOR.NAME {type(generator).__name__}: its anchors are not "
                    "boxes of four numbers, so their fit cannot be measured"
                )
            anchors = anchors.reshape(side, side, -1, 4)[:2, :2]
            right, down = anchors[0, 1] - anchors[0, 0], anchors[1, 0] - anchors[0, 0]
            x, y = float(np.median(right[:, 0])), float(np.median(down[:, 1]))
            rounding = 1e-6 * max(1.0, np.abs(anchors).max())  # they are float32
            if not np.allclose(right, [x, 0, x, 0], rtol=0, atol=rounding) or not np.allclose(
                down, [0, y, 0, y], rtol=0, atol=rounding
            ):
                raise ConfigError(
                    f"MODEL.ANCHOR_GENERATOR.NAME {type(generator).__name__}: its anchors are not "
                    "the same boxes at every location, so their fit cannot be measured"
                )
            cells.append(anchors[0, 0])
            steps.append((x, y))
        return cls(names, tuple(cells), tuple(steps), strides, divisibility, square, generator)

    @property
    def num_cell_anchors(self) -> int:
        """A, the anchors at a location."""
        return len(self.cells[0])

    def map_shapes(self, shapes_I2: np.ndarray) -> np.ndarray:
        """(I, L, 2) rows and columns of the feature maps of images of these shapes, padded."""
        padded = shapes_I2 if self.square <= 0 else np.full_like(shapes_I2, self.square)
        if self.divisibility > 1:
            padded = -(-padded // self.divisibility) * self.divisibility
        return -(-padded[:, None] // np.array(self.strides)[None, :, None])

    def anchors(self, map_shapes_L2: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per level (Hi*Wi*A, 4), the anchors of one image, from the generator."""
        features = [torch.empty(1, 1, int(rows), int(columns)) for rows, columns in map_shapes_L2]
        return [boxes.tensor for boxes in self.generator(features)]

    def best_iou(self, boxes_G4: np.ndarray, map_shapes_GL2: np.ndarray) -> np.ndarray:
        """(G,) the highest IoU of each box with an anchor of its image; float64.

        Args:
            boxes_G4: XYXY in pixels of the network's input.
            map_shapes_GL2: (G, L, 2) rows and columns of the feature maps of each box's image.
        """
        best_G = np.zeros(len(boxes_G4))
        for start in range(0, len(boxes_G4), _CHUNK):
            part = slice(start, start + _CHUNK)
            boxes = boxes_G4[part].T[:, :, None]  # (4, g, 1)
            area = (boxes[2] - boxes[0]) * (boxes[3] - boxes[1])
            for level, (cells_A4, steps) in enumerate(zip(self.cells, self.steps)):
                overlap = np.ones(1)
                for axis, step in enumerate(steps):
                    low, high = cells_A4[:, axis], cells_A4[:, axis + 2]
                    last = map_shapes_GL2[part, level, 1 - axis, None] - 1
                    overlap = overlap * _best_overlap(
                        boxes[axis], boxes[axis + 2], low, high, step, last
                    )
                sides = cells_A4[:, 2:] - cells_A4[:, :2]
                iou = overlap / (area + sides.prod(axis=1) - overlap)
                np.maximum(best_G[part], iou.max(axis=1), out=best_G[part])
        return best_G


def _best_overlap(
    box_low: np.ndarray,
    box_high: np.ndarray,
    low_A: np.ndarray,
    high_A: np.ndarray,
    step: float,
    last: np.ndarray,
) -> np.ndarray:
    """(g, A) longest overlap of an interval with an anchor's, over the locations 0 to ``last``.

    It is greatest where the centres are nearest, and falls to both sides. So the nearest location
    is the best one, and the border's if that lies outside the grid.
    """
    centre_A = (low_A + high_A) / 2
    if np.ptp(centre_A) == 0:
        centre_A = centre_A[:1]  # usual: all anchors of a location have one centre
    location = np.rint(((box_low + box_high) / 2 - centre_A) / step)
    shift = np.clip(location, 0, last) * step
    overlap = np.minimum(box_high, high_A + shift) - np.maximum(box_low, low_A + shift)
    return overlap.clip(min=0)
