"""Tensors on their way: copies to a GPU that do not synchronise, sums over the processes."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor

__all__ = ["sum_over_processes", "to_device"]


def to_device(x: Any, device: torch.device) -> Any:
    """Copy a tensor, ``Boxes``, ``Instances`` or a list of them to a device.

    ``Tensor.to`` from pageable memory waits until the GPU has finished all queued work; Detectron2
    does that once for each image and twice for its ground truth. A copy from pinned memory is only
    queued.

    The field ``gt_iscrowd`` of ``Instances`` stays where it is: the labeler reads it on the host.
    Objects of other types are copied by their own method ``to``.
    """
    if isinstance(x, list):
        return [to_device(value, device) for value in x]
    if isinstance(x, Instances):
        fields = {
            name: to_device(value, device)
            if hasattr(value, "to") and name != "gt_iscrowd"
            else value
            for name, value in x.get_fields().items()
        }
        return Instances(x.image_size, **fields)
    if type(x) is Boxes:  # a subclass, e.g. RotatedBoxes, has its own ``to``
        return Boxes(to_device(x.tensor, device))
    if isinstance(x, Tensor) and device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    if isinstance(x, Tensor) and x.device == device:
        return x  # torch.jit.trace would record ``to`` with the dtype of the traced image
    return x.to(device)


def sum_over_processes(x: Tensor) -> Tensor:
    """Add up ``x`` in place over all processes, each of which must call this, and return it."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x)
    return x
