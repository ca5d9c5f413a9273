"""Speed and memory of a detector: precision, memory format, compilation, activation checkpointing.

Weights and the names in state dicts stay as they are, so a checkpoint loads whatever the options
were when it was written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.layers.blocks import CNNBlockBase
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from retina_plugin.data.views import build_resizes
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import RetinaNetWithTTA, TimmFeatures

__all__ = [
    "Autocast",
    "build_detector",
    "checkpoint_activations",
    "inference_dtype",
    "prepare_model",
    "training_dtype",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The autocast type of training (``SOLVER.AMP``); None without autocast."""
    return _DTYPES[cfg.SOLVER.AMP.PRECISION] if cfg.SOLVER.AMP.ENABLED else None


def inference_dtype(cfg: CfgNode) -> torch.dtype:
    """The type of inference (``TEST.PRECISION``)."""
    return _DTYPES[cfg.TEST.PRECISION]


class Autocast(nn.Module):
    """Runs a detector's forward pass under autocast, so that convolutions compute in ``dtype``.

    Autocast ends with the forward pass: an evaluator computes in its own precision.

    Args:
        model: the detector. The wrapper has its training mode; the detector itself is not changed.
        device_type: "cpu" or "cuda".
        dtype: with ``torch.float32`` the wrapper does nothing.
    """

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.device_type, self.dtype = device_type, dtype

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """What the detector returns."""
        if self.dtype == torch.float32:
            return self.model(batched_inputs)  # an autocast that the caller has entered stays
        with torch.autocast(self.device_type, self.dtype):
            return self.model(batched_inputs)


def build_detector(cfg: CfgNode, model: nn.Module) -> Autocast:
    """``model`` as it detects: in ``TEST.PRECISION``, and in the views of ``TEST.AUG``.

    With ``TEST.AUG.ENABLED`` it takes images of their original size.
    """
    if cfg.TEST.AUG.ENABLED:
        model = RetinaNetWithTTA.build(cfg, model, build_resizes(cfg))
    return Autocast(model, torch.device(cfg.MODEL.DEVICE).type, inference_dtype(cfg))


def prepare_model(
    model: nn.Module,
    *,
    channels_last: bool = False,
    compile_parts: bool = False,
    compile_backend: str | Callable[..., Any] = "inductor",
    activation_checkpointing: bool = False,
) -> None:
    """Change a detector in place. Its results stay the same except for rounding.

    A second call adds its options to those of the first.

    Args:
        model: has ``backbone`` (images -> features) and ``head`` (list of features -> predictions),
            as Detectron2's ``DenseDetector``.
        channels_last: images, weights and features in NHWC memory, which the 16-bit convolutions of
            oneDNN and cuDNN are fastest with.
        compile_parts: ``torch.compile`` backbone and head in place. Assignment and loss are not
            compiled, because their shapes depend on the ground truth. The code is
            compiled for images of any size, so a training on COCO compiles a few times, and not
            once for each size.
        compile_backend: a backend of ``torch.compile``.
        activation_checkpointing: see :func:`checkpoint_activations`.

    Raises:
        ConfigError: the model has no such parts, or a trainable batch norm would be both compiled
            and checkpointed.
    """
    if not (channels_last or compile_parts or activation_checkpointing):
        return
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__} has no backbone and head: leave "
            "MODEL.CHANNELS_LAST, MODEL.COMPILE and MODEL.ACTIVATION_CHECKPOINTING at their "
            "defaults"
        )
    if channels_last:
        model.to(memory_format=torch.channels_last)
        backbone.register_forward_pre_hook(_to_channels_last)
    if activation_checkpointing:
        compiled = compile_parts or getattr(backbone, "_compiled_call_impl", None) is not None
        if compiled and (_stateful_norms(backbone) or _stateful_norms(head)):
            raise ConfigError(
                "MODEL.COMPILE with MODEL.ACTIVATION_CHECKPOINTING cannot train batch norm: set "
                "MODEL.RESNETS.NORM FrozenBN or GN, MODEL.TIMM.NORM FrozenBN (and MODEL.FPN.NORM, "
                "MODEL.RETINANET.NORM), or one of the two options False"
            )
        checkpoint_activations(backbone, head)
    if compile_parts:
        for part in (backbone, head):
            part.compile(backend=compile_backend, dynamic=True)


def _to_channels_last(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(memory_format=torch.channels_last),)


def checkpoint_activations(backbone: nn.Module, head: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them. Changes both parts.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), by
    ``torch.utils.checkpoint``.

    Checkpointed one by one are every trainable ``CNNBlockBase`` of the backbone (a frozen block
    keeps nothing anyway), or the blocks of a model of timm, and every ``nn.Sequential`` of the
    head, once a level. A head without an ``nn.Sequential`` is checkpointed as a whole.

    Gradients equal those of the plain model to the bit if its operations are deterministic. The
    recomputation draws the same random numbers. It does not update the running statistics of batch
    norm. ``CycleBatchNormList`` has a norm for each level and a counter of the next one; the
    recomputation starts with the counter's value of the first computation.
    """
    blocks: list[nn.Module] = [m for m in backbone.modules() if isinstance(m, CNNBlockBase)]
    bottom_up = getattr(backbone, "bottom_up", None)
    if isinstance(bottom_up, TimmFeatures):
        blocks += bottom_up.blocks()
    blocks = [m for m in blocks if any(p.requires_grad for p in m.parameters())]
    subnets: list[nn.Module] = [m for m in head.children() if isinstance(m, nn.Sequential)]
    for module in blocks + (subnets or [head]):
        # Replaced on the instance, because a wrapping module would rename the parameters.
        module.forward = functools.partial(
            _checkpointed_forward, module.forward, _stateful_norms(module)
        )


def _stateful_norms(module: nn.Module) -> list[nn.Module]:
    """The norms in a module that a forward pass changes."""
    return [m for m in module.modules() if isinstance(m, (_BatchNorm, CycleBatchNormList))]


def _checkpointed_forward(forward: Callable[..., Any], norms: list[nn.Module], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    if not norms:
        return checkpoint(forward, *args, use_reentrant=False)
    contexts = functools.partial(_checkpoint_contexts, norms)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def _checkpoint_contexts(norms: list[nn.Module]) -> tuple[Any, Any]:
    """The contexts of the first and of the second computation, made before the first one."""
    return contextlib.nullcontext(), _RestoredNorms(norms)


class _RestoredNorms:
    """While entered, norm layers are as they were at construction, and learn no statistics."""

    def __init__(self, norms: list[nn.Module]) -> None:
        self._norms = [m for m in norms if isinstance(m, _BatchNorm)]
        self._cycles = [(m, m._pos) for m in norms if isinstance(m, CycleBatchNormList)]
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        for norm in self._norms:
            # The batch is still normalised by its own statistics, and the running ones stay.
            self._set(norm, "momentum", 0.0)
            if norm.num_batches_tracked is not None:
                # The recomputation increments a copy of the counter.
                self._set(norm, "num_batches_tracked", norm.num_batches_tracked.clone())
        for cycle, position in self._cycles:
            self._set(cycle, "_pos", position)

    def __exit__(self, *exception: object) -> None:
        # PyTorch may end the second computation early, by an exception.
        self._undo.close()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
