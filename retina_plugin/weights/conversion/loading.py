"""Weights of other libraries that are loaded as they are, by ``MODEL.WEIGHTS``."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from retina_plugin.errors import ConfigError

from .imagenet import TORCHVISION_INPUT
from .source import Converted
from .sources import find_source, without_prefix

__all__ = ["translate"]

logger = logging.getLogger("retina_plugin")


def translate(checkpoint: dict[str, Any], model: nn.Module, path: str) -> None:
    """Give the weights of Detectron's RetinaNets and torchvision's ResNets our names, in place.

    Detectron2's own loader knows neither: it would leave P6, P7 and the head of the first as they
    were initialised. A warning says if the config contradicts what the weights were trained with.
    Weights that the loader or the model itself knows stay as they are.

    Args:
        checkpoint: of :func:`retina_plugin.weights.read_checkpoint`.
        model: that they are loaded into.
        path: for messages.

    Raises:
        ConfigError: they are of a library whose weights need a config of their own, so that
            ``retina convert`` has to be run.
    """
    names = model.state_dict().keys()
    state = checkpoint["model"]
    if names & state.keys():
        return
    if checkpoint.get("__author__") == "torchvision":  # Detectron2's torchvision/R-50.pkl
        _warn_of_input(model, _input_config(TORCHVISION_INPUT), path)
        return
    state = without_prefix(state)
    source = find_source(state)
    if source is None:
        return
    if source.name in ("detectron", "imagenet"):
        try:
            converted = source.convert(state)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not names & converted.state.keys():
            return  # another kind of model, which Detectron2's heuristics may know
        is_caffe2 = "res5_0_branch2a_w" in state
        # Of ResNeXts and of batch norm with statistics there are both kinds.
        is_known = not is_caffe2 or ("res_conv1_bn_rm" not in state and not _is_resnext(converted))
        if is_known or source.name == "detectron":
            _warn_of_input(model, converted.config, path)
        if is_caffe2 and source.name == "imagenet":
            return  # Detectron2's loader knows MSRA's
        checkpoint["model"] = converted.state
        checkpoint.pop("matching_heuristics", None)
        checkpoint.pop("__author__", None)
        if converted.class_names:
            checkpoint.setdefault("class_names", converted.class_names)
        kind = "a RetinaNet of Detectron" if source.name == "detectron" else "a ResNet"
        logger.info(
            "%-11s %s as %s; `retina convert` also writes the config that belongs to it",
            *("Recognised", path, kind),
        )
    elif source.name != "detectron2" and any(name.startswith("head.") for name in names):
        raise ConfigError(
            f"{path} has the weights of {source.name}'s RetinaNet, which need a config of their "
            f"own: run `retina convert {path} --output NEW.pth`, and use NEW.pth and NEW.yaml"
        )


def _is_resnext(converted: Converted) -> bool:
    return converted.config["MODEL"]["RESNETS"].get("NUM_GROUPS", 1) > 1


def _input_config(values: dict[str, Any]) -> dict[str, Any]:
    model = {key: values[key] for key in ("PIXEL_MEAN", "PIXEL_STD")}
    model["RESNETS"] = {"STRIDE_IN_1X1": False}
    return {"MODEL": model, "INPUT": {"FORMAT": values["FORMAT"]}}


def _warn_of_input(model: nn.Module, config: dict[str, Any], path: str) -> None:
    """One warning, if the model's input or its strides are not those of the weights' config."""
    wrong = []
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        ours, theirs = getattr(model, key.lower(), None), config["MODEL"].get(key)
        if not isinstance(ours, torch.Tensor) or theirs is None:
            continue
        # Detectron's means and Detectron2's differ by less than a grey level.
        if not torch.allclose(ours.detach().cpu().flatten(), torch.tensor(theirs), atol=2):
            wrong.append(f"MODEL.{key} {theirs}")
    format_ = config.get("INPUT", {}).get("FORMAT")
    if format_ and getattr(model, "input_format", format_) != format_:
        wrong.append(f"INPUT.FORMAT {format_}")
    stride_in_1x1 = config["MODEL"]["RESNETS"].get("STRIDE_IN_1X1")
    for name, module in model.named_modules():
        if name.endswith("res3.0.conv1") and stride_in_1x1 is not None:
            block = model.get_submodule(name.removesuffix(".conv1"))
            is_bottleneck = hasattr(block, "conv3")
            if is_bottleneck and (module.stride[0] > 1) != stride_in_1x1:
                wrong.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {stride_in_1x1}")
    if wrong:
        logger.warning(
            "%s was trained with %s: set them, the config has others", path, ", ".join(wrong)
        )
