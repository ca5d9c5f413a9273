"""RetinaNets of Detectron, the authors' first code, whose blobs have Caffe2's names.

Names and channel orders: detectron/modeling/retinanet_heads.py, FPN.py, ResNet.py; anchors:
detectron/core/test_retinanet.py (_create_cell_anchors), modeling/generate_anchors.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retina_plugin.errors import ConfigError

from .resnets import resnet_config
from .source import Converted, Source, coco_names

__all__ = ["SOURCE", "add_affine_statistics", "backbone_name"]

_LOGITS, _DELTAS = "retnet_cls_pred_fpn3", "retnet_bbox_pred_fpn3"
_NUM_SCALES = 3
# Detectron's anchors of a location run through the ratios 1, 2, 1/2 for each scale, ours through
# 1/2, 1, 2: where each of ours stands in Detectron's.
_RATIO_ORDER = (2, 0, 1)

# Caffe2's AffineChannel is batch norm without statistics. Detectron2's eps is added to it.
_AFFINE_VAR = 1.0 - 1e-5

_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_PARAMETERS = {"w": "weight", "b": "bias"}
_NOTES = [
    "Detectron pads images to a multiple of 128 pixels, resizes them without antialiasing, keeps "
    "every score on P7 and counts the last pixel as a part of a box in NMS; here all of this is "
    "done as in Detectron2, so detections differ a little.",
    "Anchors are not in the file; those of its own RetinaNets were taken (ANCHOR_SCALE 4). If the "
    "model has others, set MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS to them.",
]


def _recognises(state: Mapping[str, Tensor]) -> bool:
    return f"{_LOGITS}_w" in state


def _convert(state: Mapping[str, Tensor]) -> Converted:
    for name in (f"{_LOGITS}_w", f"{_DELTAS}_w", "fpn_6_w", "fpn_7_w", "conv1_w"):
        if name not in state:
            raise ConfigError(
                f"'{name}' is missing: only Detectron's RetinaNets with levels P3 to P7 on a "
                "ResNet or ResNeXt can be converted"
            )
    num_anchors, num_classes = _check_head(state)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _new_name(name)
        if new.startswith(("head.cls_score.", "head.bbox_pred.")):
            by_anchor = value.unflatten(0, (num_anchors // 3, 3, -1))
            value = by_anchor[:, _RATIO_ORDER].flatten(0, 2)
        converted[new] = value.clone()
    if not any(name.startswith("head.bbox_subnet.") for name in converted):
        # RETINANET.SHARE_CLS_BBOX_TOWER: one subnet feeds both last convs
        for name in [n for n in converted if n.startswith("head.cls_subnet.")]:
            converted[name.replace("cls", "bbox")] = converted[name].clone()
    add_affine_statistics(converted)
    names = coco_names(num_classes)
    resnets = resnet_config(converted)
    is_resnext = resnets.get("NUM_GROUPS", 1) > 1
    resnets["STRIDE_IN_1X1"] = not is_resnext
    notes = [
        (
            "A ResNeXt: a block's stride is in its 3x3 conv, as in Detectron's configs."
            if is_resnext
            else "A ResNet: a block's stride is in its first 1x1 conv, as in MSRA's (set "
            "MODEL.RESNETS.STRIDE_IN_1X1 False if it was trained with RESNETS.STRIDE_1X1 False)."
        ),
        *_NOTES,
    ]
    if names:
        notes.insert(0, "80 classes: the names are COCO's.")
    retinanet = {
        "NUM_CLASSES": num_classes,
        "NUM_CONVS": sum(f"head.cls_subnet.{2 * i}.weight" in converted for i in range(100)),
    }
    config: dict[str, Any] = {
        "_BASE_": ["retina_R50_800.yaml", "_base_/protocol_detectron1.yaml"],
        "MODEL": {
            "PIXEL_STD": [1.0, 1.0, 1.0],
            "RESNETS": resnets,
            "FPN": {"OUT_CHANNELS": len(state["fpn_7_w"])},
            "ANCHOR_GENERATOR": {"NAME": "DetectronAnchorGenerator"},
            "RETINANET": retinanet,
        },
    }
    return Converted(converted, config, names, notes)


def add_affine_statistics(state: dict[str, Tensor]) -> None:
    """Give norms without statistics, which are AffineChannel, those that change nothing, in place.

    Args:
        state: with our names.
    """
    for name in [n for n in state if n.endswith(".norm.weight")]:
        mean, var = (name.replace("weight", part) for part in ("running_mean", "running_var"))
        state.setdefault(mean, torch.zeros_like(state[name]))
        state.setdefault(var, torch.full_like(state[name], _AFFINE_VAR))


def _check_head(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(anchors of a location, classes)."""
    logits, deltas = len(state[f"{_LOGITS}_w"]), len(state[f"{_DELTAS}_w"])
    num_anchors = 3 * _NUM_SCALES
    if deltas == 4 * num_anchors and logits % num_anchors == 0:
        if logits // num_anchors == 81:
            raise ConfigError(
                "its head has 81 classes, which is COCO with background (RETINANET.SOFTMAX True): "
                "only sigmoid heads can be converted"
            )
        return num_anchors, logits // num_anchors
    if deltas == 4 * logits:
        raise ConfigError(
            "it has boxes for each class (RETINANET.CLASS_SPECIFIC_BBOX True): only heads with one "
            "box for each anchor can be converted"
        )
    raise ConfigError(
        f"its head has {logits} and {deltas} channels: only nine anchors at a location can be "
        "converted (RETINANET.SCALES_PER_OCTAVE 3 and three ASPECT_RATIOS)"
    )


def _new_name(name: str) -> str:
    backbone = backbone_name(name)
    if backbone:
        return backbone
    if m := re.fullmatch(r"fpn_inner_res([345])_\d+_sum(?:_lateral)?_([wb])", name):
        return f"backbone.fpn_lateral{m[1]}.{_PARAMETERS[m[2]]}"
    if m := re.fullmatch(r"fpn_res([345])_\d+_sum_([wb])", name):
        return f"backbone.fpn_output{m[1]}.{_PARAMETERS[m[2]]}"
    if m := re.fullmatch(r"fpn_([67])_([wb])", name):
        return f"backbone.top_block.p{m[1]}.{_PARAMETERS[m[2]]}"
    if m := re.fullmatch(r"retnet_(cls|bbox)_conv_n(\d+)_fpn3_([wb])", name):
        return f"head.{m[1]}_subnet.{2 * int(m[2])}.{_PARAMETERS[m[3]]}"
    if m := re.fullmatch(r"retnet_(cls|bbox)_pred_fpn3_([wb])", name):
        layer = "cls_score" if m[1] == "cls" else "bbox_pred"
        return f"head.{layer}.{_PARAMETERS[m[2]]}"
    raise ConfigError(
        f"'{name}' is not a blob of Detectron's RetinaNets that can be converted: ResNet or "
        "ResNeXt with AffineChannel, FPN without norm, levels P3 to P7"
    )


def backbone_name(name: str) -> str | None:
    """Our name of a blob of a ResNet or ResNeXt of three convs a block; None if it is none."""
    prefix = "backbone.bottom_up"
    if name == "conv1_w":
        return f"{prefix}.stem.conv1.weight"
    if m := re.fullmatch(r"res_conv1_bn_(s|b|rm|riv)", name):
        return f"{prefix}.stem.conv1.norm.{_NORM[m[1]]}"
    if m := re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_w", name):
        return f"{prefix}.res{m[1]}.{m[2]}.{_BRANCHES[m[3]]}.weight"
    if m := re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_bn_(s|b|rm|riv)", name):
        return f"{prefix}.res{m[1]}.{m[2]}.{_BRANCHES[m[3]]}.norm.{_NORM[m[4]]}"
    return None


SOURCE = Source("detectron", _recognises, _convert)
