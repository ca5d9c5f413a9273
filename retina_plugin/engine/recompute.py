"""Activation checkpointing: the backward pass computes activations again instead of keeping them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), as PyTorch's
``torch.utils.checkpoint`` has it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import CycleBatchNormList
from detectron2.layers.blocks import CNNBlockBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations", "has_state"]


def checkpoint_activations(backbone: nn.Module, head: nn.Module) -> None:
    """Keep only the inputs of residual blocks and of the head's subnets for the backward pass.

    Those are, each by itself, every trainable ``CNNBlockBase`` of the backbone (a frozen one keeps
    nothing) and every ``nn.Sequential`` of the head, level by level; a head without one as a
    whole. Names of parameters and buffers stay. Gradients are those of the plain model to the bit
    where the operations are deterministic: random numbers, running statistics of batch norm and
    the position in a norm that cycles over levels are in the second computation what they were in
    the first.

    Args:
        backbone, head: changed in place; for good.
    """
    blocks: list[nn.Module] = [
        m
        for m in backbone.modules()
        if isinstance(m, CNNBlockBase) and any(p.requires_grad for p in m.parameters())
    ]
    subnets: list[nn.Module] = [m for m in head.children() if isinstance(m, nn.Sequential)]
    for module in blocks + (subnets or [head]):
        # on the instance: a wrapping module would rename the parameters
        module.forward = functools.partial(_forward, module.forward, _stateful(module))


def has_state(module: nn.Module) -> bool:
    """Whether a second forward pass changes more than activations: trainable batch norm."""
    return bool(_stateful(module))


def _stateful(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (_BatchNorm, CycleBatchNormList))]


def _forward(forward: Callable[..., Any], stateful: list[nn.Module], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    if not stateful:
        return checkpoint(forward, *args, use_reentrant=False)
    contexts = functools.partial(_contexts, stateful)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def _contexts(stateful: list[nn.Module]) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _AsBefore(stateful)


class _AsBefore:
    """While it is entered, norms are where they were when it was made, and learn no statistics."""

    def __init__(self, stateful: list[nn.Module]) -> None:
        self._norms = [m for m in stateful if isinstance(m, _BatchNorm)]
        self._cycles = [(m, m._pos) for m in stateful if isinstance(m, CycleBatchNormList)]
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        for norm in self._norms:
            self._set(norm, "momentum", 0.0)
            if norm.num_batches_tracked is not None:
                # what is counted now is thrown away
                self._set(norm, "num_batches_tracked", norm.num_batches_tracked.clone())
        for cycle, position in self._cycles:
            self._set(cycle, "_pos", position)

    def __exit__(self, *exception: object) -> None:
        # also where PyTorch stops it early, which it does by an exception
        self._undo.close()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
