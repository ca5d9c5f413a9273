"""Reading weights files of any origin. Nothing that a file holds is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from retina_plugin.errors import ConfigError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """What a weights file holds, in the form of Detectron2's checkpoints.

    Returns:
        {"model": name -> tensor, ...} and what else the file holds.

    Raises:
        ConfigError: the file is damaged, or it is no weights file.
    """
    path = Path(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return loaded if "model" in loaded else {"model": loaded}
