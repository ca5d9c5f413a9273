"""RetinaNets of Detectron2, its model zoo included, and of this plugin: the names stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from retina_plugin.errors import ConfigError

from .resnets import resnet_config
from .source import Converted, Source, coco_names

__all__ = ["SOURCE", "of_a_training"]

_P6 = "backbone.top_block.p6.weight"
_REQUIRED = ("head.cls_score.weight", "head.bbox_pred.weight", "backbone.fpn_lateral5.weight", _P6)
# Buffers of old checkpoints, which now come from the config.
_BUFFERS = re.compile(r"pixel_(mean|std)|anchor_generator\.cell_anchors\.\d+")


def _recognises(state: Mapping[str, Tensor]) -> bool:
    return "head.cls_score.weight" in state and _P6 in state


def _convert(state: Mapping[str, Tensor]) -> Converted:
    for name in _REQUIRED:
        if name not in state:
            raise ConfigError(
                f"'{name}' is missing: only RetinaNets with levels P3 to P7 on a ResNet or ResNeXt "
                "can be converted"
            )
    converted = {k: v.clone() for k, v in state.items() if not _BUFFERS.fullmatch(k)}
    num_anchors = len(state["head.bbox_pred.weight"]) // 4
    num_classes = len(state["head.cls_score.weight"]) // max(num_anchors, 1)
    if num_anchors != 9:
        raise ConfigError(
            f"it has {num_anchors} anchors at a location, and Detectron2's RetinaNets have 9: "
            "their sizes are not in the weights, so use the config that it was trained with"
        )
    resnets = resnet_config(converted)
    is_resnext = resnets.get("NUM_GROUPS", 1) > 1
    resnets |= {"STRIDE_IN_1X1": not is_resnext, "NORM": _backbone_norm(converted)}
    convs = [m for n, v in converted.items() if (m := _CONV.fullmatch(n)) and v.dim() == 4]
    channels = len(state[_P6])
    retinanet = {
        "NUM_CLASSES": num_classes,
        "NUM_CONVS": len(convs),
        "NORM": _head_norm(converted),
        "P6_SOURCE": "p5" if state[_P6].shape[1] == channels else "res5",
    }
    names = coco_names(num_classes)
    notes = [
        "Anchors, pixel mean and standard deviation, and the stride of a block are not in the "
        "weights: the config has those of Detectron2's model zoo.",
    ]
    if names:
        notes.append("80 classes: the names are COCO's.")
    model: dict[str, Any] = {
        "PIXEL_STD": [57.375, 57.12, 58.395] if is_resnext else [1.0, 1.0, 1.0],
        "RESNETS": resnets,
        "FPN": {"OUT_CHANNELS": channels, "NORM": _fpn_norm(converted)},
        "RETINANET": retinanet,
    }
    base = ["retina_R50_800.yaml", "_base_/protocol_detectron2.yaml"]
    return Converted(converted, {"_BASE_": base, "MODEL": model}, names, notes)


def of_a_training(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> Converted | None:
    """A checkpoint of this plugin's trainer, which holds its config; None if it is none."""
    resume = checkpoint.get("resume")
    text = resume.get("config") if isinstance(resume, Mapping) else None
    if not isinstance(text, str) or not _recognises(state):
        return None
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("MODEL"), dict):
        return None
    notes = ["The config is that of the training, from the checkpoint."]
    if config.pop("IMPORTS", None):  # a file of weights may not choose what is run
        notes.append("Its IMPORTS are left out: add those that you trust.")
    for key in ("OUTPUT_DIR", "_BASE_"):  # a base could have imports of its own
        config.pop(key, None)
    return Converted(dict(state), config, None, notes)


_CONV = re.compile(r"head\.cls_subnet\.(\d+)\.weight")


def _backbone_norm(state: Mapping[str, Tensor]) -> str:
    norm = "backbone.bottom_up.stem.conv1.norm"
    if f"{norm}.running_var" not in state:
        return "GN" if f"{norm}.weight" in state else ""
    return "BN" if f"{norm}.num_batches_tracked" in state else "FrozenBN"


def _fpn_norm(state: Mapping[str, Tensor]) -> str:
    norm = "backbone.fpn_lateral5.norm"
    if f"{norm}.running_var" in state:
        return "BN"
    return "GN" if f"{norm}.weight" in state else ""


def _head_norm(state: Mapping[str, Tensor]) -> str:
    """Norms are between the convs: "cls_subnet.1", or with one for each level "cls_subnet.1.0"."""
    if any(re.fullmatch(r"head\.cls_subnet\.1\.\d\.running_var", name) for name in state):
        return "BN"
    return "GN" if "head.cls_subnet.1.weight" in state else ""


SOURCE = Source("detectron2", _recognises, _convert)
