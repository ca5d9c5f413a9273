"""Models of timm: their names, the strides of their features, and how they are made."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from retina_plugin.errors import ConfigError, did_you_mean

__all__ = [
    "ADVICE",
    "NAME",
    "check_timm_name",
    "create_features",
    "feature_index",
    "feature_strides",
    "image_size",
    "import_timm",
    "pixel_statistics",
]

NAME = "MODEL.TIMM.NAME"
ADVICE = "take another model, e.g. resnet18 or convnext_atto"


def import_timm() -> ModuleType:
    """timm.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError(
            f"{NAME}: timm is not installed: pip install 'retina_plugin[timm]' or pip install timm"
        ) from None


def check_timm_name(name: str, key: str = NAME) -> None:
    """Raise a :class:`ConfigError` if timm has no model, or no weights, of this name.

    Args:
        name: "resnet18", or with the tag of its weights, "resnet18.a1_in1k".
        key: what the user set.
    """
    timm = import_timm()
    if not name:
        raise ConfigError(f'{key}: is empty: set it to a model of timm, e.g. "resnet18"')
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = did_you_mean(model, timm.list_models())
        raise ConfigError(f"{key}: timm has no model '{model}'{near}; timm.list_models() has all")
    tagged = timm.list_models(f"{model}.*", pretrained=True)
    if tag and name not in tagged:
        raise ConfigError(
            f"{key}: timm has no weights '{name}'{did_you_mean(name, tagged)}; it has "
            f"{', '.join(tagged) or f'none of {model}'}"
        )


def create_features(
    name: str, indices: Sequence[int], *, in_channels: int = 3, pretrained: bool = False
) -> Any:
    """timm's own module that gives the features with these numbers, as a list.

    Args:
        pretrained: with timm's weights, from its cache or the network.

    Raises:
        ConfigError: the model gives no feature maps.
    """
    timm = import_timm()
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(indices)}
    if timm.get_pretrained_cfg(name).fixed_input_size and "swin" in name:
        options["strict_img_size"] = False  # windows fit images of any size
    try:
        return timm.create_model(name, in_chans=in_channels, pretrained=pretrained, **options)
    except (RuntimeError, AssertionError, AttributeError) as error:
        if pretrained:
            raise
        raise ConfigError(f"{NAME}: timm's {name} gives no feature maps: {error}") from None


def feature_strides(name: str) -> list[int]:
    """The stride of each feature of a model, in the order of their numbers."""
    check_timm_name(name)
    with torch.device("meta"):  # no memory, no random numbers
        features = create_features(name, (-1,))
    return [info["reduction"] for info in features.feature_info.info]


def feature_index(name: str, strides: Sequence[int], stride: int, freeze_key: str = "") -> int:
    """The number of the last feature with a stride.

    Args:
        strides: of :func:`feature_strides`.
        freeze_key: the key that names the feature, if it is the last one to be frozen.

    Raises:
        ConfigError: there is no such feature.
    """
    found = [index for index, x in enumerate(strides) if x == stride]
    if found:
        return found[-1]
    has = ", ".join(map(str, sorted(set(strides))))
    if freeze_key:
        levels = [0] + sorted({int(math.log2(x)) for x in strides if x in (2, 4, 8, 16, 32)})
        raise ConfigError(
            f"{freeze_key}: {int(math.log2(stride))} freezes what the feature of stride {stride} "
            f"is made with, but timm's {name} has the strides {has}: set it to one of "
            f"{', '.join(map(str, levels))}"
        )
    raise ConfigError(
        f"{NAME}: the pyramid needs a feature of stride {stride}, but timm's {name} has the "
        f"strides {has}: {ADVICE}"
    )


def image_size(name: str) -> str:
    """The size of the images that a model was made for, e.g. "224 x 224 pixels"."""
    _, height, width = import_timm().get_pretrained_cfg(name).input_size
    return f"{height} x {width} pixels"


def pixel_statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels that a model was trained with: RGB, 0 to 255."""
    known = import_timm().get_pretrained_cfg(name)
    mean, std = ([round(255 * x, 3) for x in values] for values in (known.mean, known.std))
    return mean, std
