"""ResNets and ResNeXts trained on ImageNet: torchvision's, and MSRA's with Caffe2's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from retina_plugin.errors import ConfigError

from . import detectron
from .resnets import resnet_config, torchvision_name
from .source import Converted, Source

__all__ = ["SOURCE", "TORCHVISION_INPUT"]

TORCHVISION_INPUT = {
    "FORMAT": "RGB",
    "PIXEL_MEAN": [123.675, 116.28, 103.53],
    "PIXEL_STD": [58.395, 57.12, 57.375],
}
"""Channels (the key ``INPUT.FORMAT``), mean and standard deviation of torchvision's weights."""

_MSRA_MEAN = [103.53, 116.28, 123.675]  # BGR, as in Detectron2's configs
_STD_BGR = [57.375, 57.12, 58.395]
# The classifier; MSRA's conv1 has a bias, which Detectron and Detectron2 leave out too.
_LEFT_OUT = ("fc.weight", "fc.bias", "fc1000_w", "fc1000_b", "pred_w", "pred_b", "conv1_b")


def _recognises(state: Mapping[str, Tensor]) -> bool:
    if "layer1.0.conv1.weight" in state:
        return "conv1.weight" in state and "layer4.0.conv1.weight" in state
    return "res5_0_branch2a_w" in state and not any("fpn" in name for name in state)


def _convert(state: Mapping[str, Tensor]) -> Converted:
    is_caffe2 = "res5_0_branch2a_w" in state
    new_name: Callable[[str], str | None]
    new_name = detectron.backbone_name if is_caffe2 else torchvision_name
    converted: dict[str, Tensor] = {}
    left_out = []
    for name, value in state.items():
        if name in _LEFT_OUT:
            left_out.append(name)
            continue
        if name.endswith("num_batches_tracked"):
            continue
        new = new_name(name)
        if new is None:
            raise ConfigError(
                f"'{name}' is not a part of a ResNet or ResNeXt that can be converted: those of "
                "torchvision with batch norm, and MSRA's with Caffe2's names"
            )
        converted[new] = value.clone()
    detectron.add_affine_statistics(converted)
    resnets = resnet_config(converted)
    is_resnext = resnets.get("NUM_GROUPS", 1) > 1
    resnets["STRIDE_IN_1X1"] = is_caffe2 and not is_resnext
    notes = ["A backbone: FPN and head are not in it, they start from random weights."]
    if left_out:
        notes.append(f"Left out: {', '.join(left_out)}.")
    if is_caffe2 and is_resnext:
        notes.append(
            "ResNeXts with Caffe2's names exist with the standard deviation in the first conv "
            "(Detectron's: set MODEL.PIXEL_STD [1.0, 1.0, 1.0]) and without (Detectron2's FAIR/"
            "X-101-32x8d.pkl, which the config is for)."
        )
    model: dict[str, Any] = {"RESNETS": resnets}
    config: dict[str, Any] = {"_BASE_": "retina_R50_800.yaml", "MODEL": model}
    if is_caffe2:
        model["PIXEL_MEAN"] = _MSRA_MEAN
        model["PIXEL_STD"] = _STD_BGR if is_resnext else [1.0, 1.0, 1.0]
        config["INPUT"] = {"FORMAT": "BGR"}
    else:
        model["PIXEL_MEAN"] = TORCHVISION_INPUT["PIXEL_MEAN"]
        model["PIXEL_STD"] = TORCHVISION_INPUT["PIXEL_STD"]
        config["INPUT"] = {"FORMAT": TORCHVISION_INPUT["FORMAT"]}
    return Converted(converted, config, None, notes)


SOURCE = Source("imagenet", _recognises, _convert)
