"""From the host to an accelerator without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["to_device"]


def to_device(x: Any, device: torch.device) -> Any:
    """Move tensors, ``Boxes`` and ``Instances``, also of lists and dicts; the rest stays.

    ``Tensor.to`` waits for all that is queued on a GPU where the memory may be paged out (in
    Detectron2: once an image, twice an image's ground truth). From pinned memory a copy is queued.
    """
    if isinstance(x, Mapping):
        return {name: to_device(value, device) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_device(value, device) for value in x]
    if isinstance(x, Boxes):
        return Boxes(to_device(x.tensor, device))
    if isinstance(x, Instances):
        return Instances(x.image_size, **to_device(x.get_fields(), device))
    if not isinstance(x, Tensor):
        return x.to(device) if hasattr(x, "to") else x  # Detectron2's masks, keypoints
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
