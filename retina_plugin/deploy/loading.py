"""The model of a config and weights, and what its exported file says of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import cast

from detectron2.config import CfgNode

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import FocalRetinaNet
from retina_plugin.predict.loading import load_model, prediction_cfg

from .dense import DenseModel
from .metadata import Metadata, describe_model

__all__ = ["load_for_export"]

logger = logging.getLogger("retina_plugin")


def load_for_export(
    config: str | os.PathLike | CfgNode,
    weights: str | os.PathLike,
    opts: Sequence[str] = (),
    stage: str = "nms",
) -> tuple[CfgNode, FocalRetinaNet, Metadata]:
    """The config, the model on the CPU in float32, and the metadata of its file.

    Raises:
        ConfigError: see :func:`.export.export_model`.
    """
    # What changes how a machine computes, not what: a compiled model cannot be traced.
    here = ["MODEL.COMPILE", "False", "MODEL.CHANNELS_LAST", "False"]
    cfg = prediction_cfg(config, weights, device="cpu", opts=[*opts, *here])
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ConfigError(f"INPUT.FORMAT {cfg.INPUT.FORMAT}: only BGR and RGB can be exported")
    if cfg.TEST.AUG.ENABLED:
        logger.warning("TEST.AUG.ENABLED: the file detects in one view; call it for each view")
    model, (names, category_ids) = load_model(cfg)
    dense = DenseModel(cast(FocalRetinaNet, model), stage)  # it checks
    metadata = describe_model(
        cfg,
        model.state_dict(),
        stage=stage,
        class_names=names,
        category_ids=category_ids,
        divisibility=dense.divisibility,
    )
    return cfg, cast(FocalRetinaNet, model), metadata
