"""Images for inference: in the test size, or in the sizes of ``TEST.AUG``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from .mapper import DATASET_MAPPER_REGISTRY, FastMapper

__all__ = ["build_resizes", "build_test_mapper"]


def build_test_mapper(cfg: CfgNode) -> Any:
    """The mapper that ``INPUT.MAPPER`` names, for inference.

    With ``TEST.AUG.ENABLED`` images keep their original size, because the views are made of it.
    """
    if cfg.TEST.AUG.ENABLED:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # Detectron2: 0 is "no resizing"
    return DATASET_MAPPER_REGISTRY.build(cfg, False)


def build_resizes(cfg: CfgNode) -> list[Callable[[np.ndarray], torch.Tensor]]:
    """What makes the views of ``TEST.AUG``: :meth:`FastMapper.prepare_image` for each size."""
    resizes: list[Callable[[np.ndarray], torch.Tensor]] = []
    for size in cfg.TEST.AUG.MIN_SIZES:
        of_view = cfg.clone()
        of_view.defrost()
        of_view.INPUT.MIN_SIZE_TEST, of_view.INPUT.MAX_SIZE_TEST = size, cfg.TEST.AUG.MAX_SIZE
        mapper = FastMapper(**FastMapper.from_config(of_view, is_train=False))
        resizes.append(mapper.prepare_image)
    return resizes
