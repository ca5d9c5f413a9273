"""What makes the host wait for an accelerator in Detectron2's training step, without the wait."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["AnchorGenerator", "to_device"]


class AnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's, with the grids made where the anchors are instead of copied there."""

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        anchors = []
        for (height, width), stride, cell_A4 in zip(grid_sizes, self.strides, self.cell_anchors):
            options = {"device": cell_A4.device, "dtype": torch.float32}
            start = self.offset * stride
            x = torch.arange(start, width * stride, stride, **options)
            y = torch.arange(start, height * stride, stride, **options)
            y, x = (grid.flatten() for grid in torch.meshgrid(y, x, indexing="ij"))
            centers_P4 = torch.stack((x, y, x, y), dim=1)
            anchors.append((centers_P4[:, None] + cell_A4).flatten(0, 1))
        return anchors


def to_device(x: Any, device: torch.device) -> Any:
    """Move a tensor, ``Boxes`` or ``Instances``, or each in a list; other things by their ``to``.

    ``Tensor.to`` waits for all that is queued on a GPU where the memory may be paged out (in
    Detectron2: once an image, twice an image's ground truth). From pinned memory a copy is queued.
    """
    if isinstance(x, list):
        return [to_device(value, device) for value in x]
    if isinstance(x, Instances):
        fields = x.get_fields()
        moved = {k: to_device(v, device) if hasattr(v, "to") else v for k, v in fields.items()}
        return Instances(x.image_size, **moved)
    if type(x) is Boxes:  # a subclass has boxes of another kind
        return Boxes(to_device(x.tensor, device))
    if isinstance(x, Tensor) and device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
