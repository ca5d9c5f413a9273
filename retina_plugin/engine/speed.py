"""Options that make a detector faster or smaller and leave its weights and names as they are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retina_plugin.errors import ConfigError

from .recompute import checkpoint_activations, has_state

__all__ = ["check_compiler", "prepare_model"]


def prepare_model(
    model: nn.Module,
    *,
    channels_last: bool = False,
    compile_parts: bool = False,
    compile_backend: str | Callable[..., Any] = "inductor",
    activation_checkpointing: bool = False,
) -> None:
    """Change a detector in place; results stay the same but for rounding.

    A second call adds options to those of the first.

    State dicts keep their names: checkpoints load whatever the options were when they were written.

    Args:
        model: with ``backbone`` (images -> features) and ``head`` (list of features -> predictions)
            as Detectron2's ``DenseDetector`` has them.
        channels_last: images, weights and features as NHWC in memory, which 16-bit convolutions of
            oneDNN and cuDNN want.
        compile_parts: ``torch.compile`` of backbone and head in place. Assignment and loss, whose
            shapes follow the ground truth, stay as they are. The code is for images of any size,
            so that a training on COCO's shapes compiles once.
        compile_backend: a backend of ``torch.compile``.
        activation_checkpointing: see :func:`~.recompute.checkpoint_activations`.

    Raises:
        ConfigError: a model without these parts; batch norm that is trained, compiled and computed
            twice.
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
        if compiled and (has_state(backbone) or has_state(head)):
            raise ConfigError(
                "MODEL.COMPILE with MODEL.ACTIVATION_CHECKPOINTING cannot train batch norm: set "
                "MODEL.RESNETS.NORM FrozenBN or GN (and MODEL.FPN.NORM, MODEL.RETINANET.NORM), or "
                "one of the two options False"
            )
        checkpoint_activations(backbone, head)
    if compile_parts:
        for part in (backbone, head):
            part.compile(backend=compile_backend, dynamic=True)


def _to_channels_last(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(memory_format=torch.channels_last),)


def check_compiler(device_type: str) -> None:
    """``torch.compile`` has what it needs to make code for the device.

    Raises:
        ConfigError: no C++ compiler (CPU), no Triton (GPU), or a PyTorch without in-place compile.
    """
    off = "or set MODEL.COMPILE False"
    if not hasattr(nn.Module, "compile"):
        raise ConfigError(f"MODEL.COMPILE needs PyTorch 2.2, this is {torch.__version__}: {off}")
    if device_type == "cpu":
        # the compiler that PyTorch looks for
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(name) is None:
            raise ConfigError(
                f"MODEL.COMPILE needs a C++ compiler, and there is no {name}: install one, name it "
                f"in the environment variable CXX, {off}"
            )
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError(f"MODEL.COMPILE needs Triton: install triton, {off}")
