"""16-bit training and inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retina_plugin.errors import ConfigError

__all__ = ["Autocast", "inference_dtype", "make_grad_scaler", "training_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_dtype(cfg: Any) -> torch.dtype | None:
    """The type of autocast in training (``SOLVER.AMP``); None where it is off.

    Raises:
        ConfigError: see :func:`inference_dtype`.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.PRECISION
    return _dtype("SOLVER.AMP.PRECISION", name, ("float16", "bfloat16"), cfg.MODEL.DEVICE)


def inference_dtype(cfg: Any) -> torch.dtype:
    """The type of inference (``TEST.PRECISION``).

    Raises:
        ConfigError: an unknown name, or float16 where there is no GPU.
    """
    return _dtype("TEST.PRECISION", cfg.TEST.PRECISION, tuple(_DTYPES), cfg.MODEL.DEVICE)


def _dtype(key: str, name: str, known: tuple[str, ...], device: str) -> torch.dtype:
    if name not in known:
        raise ConfigError(f"{key}: no '{name}'; known: {', '.join(known)}")
    # the CPU's float16 is slower than float32, and its small gradients vanish without a scaler
    if name == "float16" and torch.device(device).type == "cpu":
        raise ConfigError(f"{key} float16 needs a GPU: set {key} bfloat16")
    return _DTYPES[name]


class Autocast(nn.Module):
    """A detector whose forward pass runs under autocast: convolutions in ``dtype``.

    Only the forward pass: what an evaluator computes stays in its own precision.

    Args:
        model: the detector; it stays usable by itself, and both have one mode.
        device_type: "cpu", "cuda".
        dtype: ``torch.float32`` changes nothing.
    """

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.device_type, self.dtype = device_type, dtype

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """What the detector returns."""
        if self.dtype == torch.float32:
            return self.model(batched_inputs)  # also within a caller's own autocast
        with torch.autocast(self.device_type, self.dtype):
            return self.model(batched_inputs)


def make_grad_scaler(device_type: str) -> Any:
    """PyTorch's loss scaler, by the name that this version of it has."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type)
    return torch.cuda.amp.GradScaler()  # before 2.3
