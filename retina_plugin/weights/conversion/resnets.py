"""ResNets and ResNeXts: torchvision's names, and the config that belongs to the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retina_plugin.errors import ConfigError

__all__ = ["PREFIX", "resnet_config", "torchvision_name"]

PREFIX = "backbone.bottom_up."
"""Before the names of the ResNet in our models."""

# Blocks of each stage and convs of a block -> depth.
_DEPTHS: dict[tuple[int, ...], int] = {
    (2, 2, 2, 2, 2): 18,
    (3, 4, 6, 3, 2): 34,
    (3, 4, 6, 3, 3): 50,
    (3, 4, 23, 3, 3): 101,
    (3, 8, 36, 3, 3): 152,
}
_PARAMETER = r"(weight|bias|running_mean|running_var)"


def torchvision_name(name: str) -> str | None:
    """Our name of a tensor of torchvision's ResNets; None if it is none."""
    if name == "conv1.weight":
        return f"{PREFIX}stem.conv1.weight"
    if m := re.fullmatch(rf"bn1\.{_PARAMETER}", name):
        return f"{PREFIX}stem.conv1.norm.{m[1]}"
    stage = r"layer([1-4])\.(\d+)\."
    if m := re.fullmatch(rf"{stage}conv([123])\.weight", name):
        return f"{PREFIX}res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.weight"
    if m := re.fullmatch(rf"{stage}bn([123])\.{_PARAMETER}", name):
        return f"{PREFIX}res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}"
    if m := re.fullmatch(rf"{stage}downsample\.0\.weight", name):
        return f"{PREFIX}res{int(m[1]) + 1}.{m[2]}.shortcut.weight"
    if m := re.fullmatch(rf"{stage}downsample\.1\.{_PARAMETER}", name):
        return f"{PREFIX}res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}"
    return None


def resnet_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``MODEL.RESNETS`` of a ResNet or ResNeXt with our names, without ``STRIDE_IN_1X1``.

    Raises:
        ConfigError: a tensor is missing, or it has a depth that the plugin does not have.
    """
    stem = f"{PREFIX}stem.conv1.weight"
    blocks = {m[0] for name in state if (m := re.match(rf"{re.escape(PREFIX)}res\d\.\d+\.", name))}
    counts = [sum(block.startswith(f"{PREFIX}res{s}.") for block in blocks) for s in range(2, 6)]
    first = f"{PREFIX}res2.0.conv"
    num_convs = sum(f"{first}{i}.weight" in state for i in (1, 2, 3))
    depth = _DEPTHS.get((*counts, num_convs))
    if depth is None or stem not in state:
        raise ConfigError(
            f"its backbone has {counts} blocks of {num_convs} convs: known are ResNet-18, 34, 50, "
            "101, 152 and ResNeXts of these depths"
        )
    width, group_width = state[f"{first}2.weight"].shape[:2]
    resnets: dict[str, Any] = {"DEPTH": depth}
    settings = {
        "STEM_OUT_CHANNELS": (len(state[stem]), 64),
        "RES2_OUT_CHANNELS": (len(state[f"{first}{num_convs}.weight"]), 256),
        "NUM_GROUPS": (width // group_width if num_convs == 3 else 1, 1),
        "WIDTH_PER_GROUP": (group_width if num_convs == 3 else 64, 64),
    }
    return resnets | {key: value for key, (value, default) in settings.items() if value != default}
