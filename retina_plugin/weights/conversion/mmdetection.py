"""RetinaNets of MMDetection 2 and 3.

Against Detectron2's, its anchors run through the aspect ratios first, P7 is computed from P6
without a ReLU, and boxes are clipped before the NMS. (mmdet/models/necks/fpn.py,
mmdet/models/dense_heads/retina_head.py, configs/_base_/models/retinanet_r50_fpn.py)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retina_plugin.errors import ConfigError

from .head import add_conv_biases, sizes_first
from .resnets import resnet_config, torchvision_name
from .source import Converted, Source, coco_names

__all__ = ["SOURCE"]

_RATIOS, _SCALES = 3, 3  # of the anchors of a location, in all of its RetinaNets
_REQUIRED = (
    "backbone.conv1.weight",
    "backbone.bn1.running_var",
    "backbone.layer1.0.conv2.weight",
    *(f"neck.{name}.conv.weight" for name in ("lateral_convs.0", "lateral_convs.2")),
    *(f"neck.{name}.conv.weight" for name in ("fpn_convs.3", "fpn_convs.4")),
    "bbox_head.retina_cls.bias",
    "bbox_head.retina_reg.weight",
)
_IGNORED = ("num_batches_tracked", "teacher.", "ema_")  # counters; copies of the model
_PATTERNS = (
    (re.compile(r"bbox_head\.retina_cls\.(\w+)"), "head.cls_score.{0}"),
    (re.compile(r"bbox_head\.retina_reg\.(\w+)"), "head.bbox_pred.{0}"),
)
_FPN = re.compile(r"neck\.(lateral|fpn)_convs\.(\d)\.conv\.(\w+)")
_HEAD = re.compile(r"bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn)\.(\w+)")


def _recognises(state: Mapping[str, Tensor]) -> bool:
    return "bbox_head.retina_cls.weight" in state


def _convert(state: Mapping[str, Tensor]) -> Converted:
    state = {k: v for k, v in state.items() if not any(part in k for part in _IGNORED)}
    for name in _REQUIRED:
        if name not in state:
            raise ConfigError(
                f"'{name}' is missing: only the RetinaNets of MMDetection with a ResNet or ResNeXt "
                "with batch norm and an FPN with levels P3 to P7 can be converted"
            )
    has_norm = any(".gn." in name for name in state)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _new_name(name, has_norm)
        if new.startswith(("head.cls_score.", "head.bbox_pred.")):
            value = _scales_first(name, value)
        converted[new] = value.clone()
    add_conv_biases(converted)
    is_caffe = _is_caffe(state)
    names = coco_names(_num_classes(converted))
    notes = [
        "MMDetection 2 and 3 are meant; version 1 has other boxes (they include the last pixel).",
        (
            "The stem has MSRA's statistics of batch norm (style 'caffe'), so images are BGR, not "
            "divided by the standard deviation, and a block's stride is in its 1x1 conv."
            if is_caffe
            else "The stem has statistics of batch norm of its own (style 'pytorch'), so images "
            "are RGB, divided by ImageNet's standard deviation, and a block's stride is in its 3x3 "
            "conv."
        ),
        "Boxes without area, which MMDetection drops before the NMS, are kept.",
        "Anchors are not in the file; those of its base config were taken (octave_base_scale 4). "
        "If the model has others, set MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS to them.",
    ]
    if names:
        notes.append("80 classes: the names are COCO's.")
    return Converted(converted, _config(state, converted, is_caffe), names, notes)


def _new_name(name: str, has_norm: bool) -> str:
    for pattern, new in _PATTERNS:
        if match := pattern.fullmatch(name):
            return new.format(*match.groups())
    resnet_name = torchvision_name(name.removeprefix("backbone."))
    if name.startswith("backbone.") and resnet_name:
        return resnet_name
    if match := _FPN.fullmatch(name):
        kind, number, what = match.group(1), int(match.group(2)) + 3, match.group(3)
        if number > 5:
            return f"backbone.top_block.p{number}.{what}"
        return f"backbone.fpn_{'lateral' if kind == 'lateral' else 'output'}{number}.{what}"
    if match := _HEAD.fullmatch(name):
        subnet = "cls_subnet" if match.group(1) == "cls" else "bbox_subnet"
        layers = 3 if has_norm else 2  # of a conv with what follows it
        index = int(match.group(2)) * layers + (match.group(3) == "gn")
        return f"head.{subnet}.{index}.{match.group(4)}"
    raise ConfigError(
        f"'{name}' is not a part of the RetinaNets of MMDetection that can be converted: ResNet or "
        "ResNeXt with batch norm, FPN without norm, RetinaHead without norm or with GN"
    )


def _scales_first(name: str, value: Tensor) -> Tensor:
    """The channels of the last convs in Detectron2's order of the anchors of a location."""
    anchors = _RATIOS * _SCALES
    if len(value) % anchors:
        raise ConfigError(
            f"{name} has {len(value)} channels, which is no multiple of {anchors}: only the "
            f"anchors of {_SCALES} scales and {_RATIOS} aspect ratios can be converted"
        )
    return sizes_first(value, _RATIOS, _SCALES)


def _num_classes(converted: Mapping[str, Tensor]) -> int:
    return len(converted["head.cls_score.bias"]) // (_RATIOS * _SCALES)


def _is_caffe(state: Mapping[str, Tensor]) -> bool:
    """Whether the backbone is MSRA's: its batch norm has no statistics, only an affine map."""
    mean, var = state["backbone.bn1.running_mean"], state["backbone.bn1.running_var"]
    return not mean.any() and bool(((var - 1).abs() < 1e-3).all())


def _config(
    state: Mapping[str, Tensor], converted: Mapping[str, Tensor], is_caffe: bool
) -> dict[str, Any]:
    resnets = {**resnet_config(converted), "NORM": "FrozenBN"}
    if not is_caffe:
        resnets["STRIDE_IN_1X1"] = False
    p6_channels = state["neck.fpn_convs.3.conv.weight"].shape[1]
    c5_channels = state["neck.lateral_convs.2.conv.weight"].shape[1]
    retinanet: dict[str, Any] = {
        "NUM_CLASSES": _num_classes(converted),
        "NUM_CONVS": len([n for n in state if re.search(r"cls_convs\.\d\.conv\.weight", n)]),
        "P6_SOURCE": "res5" if p6_channels == c5_channels else "p5",
        "RELU_BEFORE_P7": False,
        "BOXES_OUTSIDE_TEST": "clip",
        "LOW_QUALITY_MATCHES": "always",
        "NORMALIZER": "per_gpu",
        "SMOOTH_L1_LOSS_BETA": 0.0,
    }
    if any(".gn." in name for name in state):
        retinanet["NORM"] = "GN"
    model: dict[str, Any] = {
        "RESNETS": resnets,
        "FPN": {"OUT_CHANNELS": len(state["neck.lateral_convs.0.conv.weight"])},
        "RETINANET": retinanet,
    }
    config: dict[str, Any] = {"_BASE_": "retina_R50_800.yaml", "MODEL": model}
    if is_caffe:
        model |= {"PIXEL_MEAN": [103.53, 116.28, 123.675], "PIXEL_STD": [1.0, 1.0, 1.0]}
    else:
        model |= {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}
        config["INPUT"] = {"FORMAT": "RGB"}
    return config


SOURCE = Source("mmdetection", _recognises, _convert)
