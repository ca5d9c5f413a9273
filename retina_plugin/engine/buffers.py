"""Buffers that a forward pass writes: kept before it, and put back if its step is skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

__all__ = ["WrittenBuffers", "kept_buffers"]


class WrittenBuffers:
    """The buffers that a forward pass may write, such as the statistics of batch norm.

    Args:
        model: whose buffers are on one device.
        without: modules whose own buffers are left out. A frozen norm writes none, and a ResNet-101
            has 416 of these.
    """

    def __init__(
        self, model: nn.Module, without: tuple[type[nn.Module], ...] = (FrozenBatchNorm2d,)
    ) -> None:
        self._owners = [
            (module, name)
            for module in model.modules()
            if not isinstance(module, without)
            for name in module._buffers
        ]
        self._kept: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}

    def keep(self) -> None:
        """Remember the values of now. Does not synchronise."""
        groups: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
        for module, name in self._owners:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.numel():
                groups.setdefault(buffer.dtype, []).append((module, name, buffer))
        self._kept = {}
        for dtype, group in groups.items():
            copies = _copies([buffer for *_, buffer in group])
            self._kept[dtype] = [(m, name, copy) for (m, name, _), copy in zip(group, copies)]

    def restore(self, closed: Tensor) -> None:
        """Put the kept values back where ``closed``, a bool scalar on their device, is true.

        Does not synchronise with an accelerator.
        """
        on_cpu = closed.device.type == "cpu"
        if on_cpu and not closed:
            return
        for dtype, kept in self._kept.items():
            # Looked up again: a module may have put a new tensor in the place of a buffer.
            pairs = [(module._buffers.get(name), copy) for module, name, copy in kept]
            same = [
                (now, copy)
                for now, copy in pairs
                if now is not None and now.dtype == dtype and now.shape == copy.shape
            ]
            buffers, values = [now for now, _ in same], [copy for _, copy in same]
            if not on_cpu and buffers:
                flat = torch.where(closed, _flat(values), _flat(buffers))
                values = _split_like(flat, buffers)
            torch._foreach_copy_(buffers, values)


@contextlib.contextmanager
def kept_buffers(model: nn.Module, *without: type[nn.Module]) -> Iterator[None]:
    """Afterwards, the buffers of the model are as before, except those of modules ``without``."""
    buffers = WrittenBuffers(model, (FrozenBatchNorm2d, *without))
    buffers.keep()
    try:
        yield
    finally:
        with torch.no_grad():
            device = next(model.parameters()).device
            buffers.restore(torch.ones((), dtype=torch.bool, device=device))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


@torch.no_grad()
def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one type, made by one kernel and not by one each."""
    return _split_like(_flat(tensors), tensors)
