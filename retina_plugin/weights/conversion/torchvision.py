"""torchvision's RetinaNets: ``retinanet_resnet50_fpn``, its second version, and ones like them.

The converted model computes what torchvision computes: same features, logits, deltas, detections
and losses. The config has what differs from Detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retina_plugin.errors import ConfigError

from .head import add_conv_biases, sizes_first
from .resnets import resnet_config, torchvision_name
from .source import Converted, Source

__all__ = ["SOURCE", "convert"]

_LOGITS = "head.classification_head.cls_logits.weight"
_DELTAS = "head.regression_head.bbox_reg.weight"
_STEM, _P6 = "backbone.body.conv1.weight", "backbone.fpn.extra_blocks.p6.weight"

# torchvision's sizes are whole numbers (`_default_anchorgen`), three a level, with three ratios.
_SIZES = [
    [size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))] for size in (32, 64, 128, 256, 512)
]
_NUM_SIZES, _NUM_RATIOS = 3, 3

_EPS = 1e-5  # of batch norm in PyTorch and Detectron2


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a RetinaNet of torchvision, with or without a prefix."""
    return any(name.endswith(_LOGITS) for name in state) and any(
        name.endswith(_STEM) for name in state
    )


def convert(state: Mapping[str, Tensor], bn_eps: float | None = None) -> Converted:
    """Convert the state dict of a RetinaNet of torchvision.

    Args:
        state: names and tensors of torchvision, of any version.
        bn_eps: eps of its batch norms, which no file holds. torchvision sets it to 0 for the first
            version's COCO weights, because they were trained before it had one (``overwrite_eps``),
            and so for models that were fine-tuned from them. None takes 0 for the first version
            with frozen batch norm and 1e-5 for all others. If you trained the first version from a
            backbone's weights alone, set 1e-5.

    Raises:
        ConfigError: the model is not a ResNet or ResNeXt with levels P3 to P7 and nine anchors at a
            location, or a name is unknown.

    Example::

        model = torchvision.models.detection.retinanet_resnet50_fpn_v2(weights="DEFAULT")
        converted = convert(model.state_dict())
        yaml.safe_dump(converted.config, open("v2.yaml", "w"))
        torch.save({"model": converted.state}, "v2.pth")
    """
    state = _without_prefix(state)
    num_anchors = len(state[_DELTAS]) // 4
    if num_anchors != _NUM_SIZES * _NUM_RATIOS:
        raise ConfigError(
            f"{_DELTAS} is for {num_anchors} anchors at a location, torchvision's own RetinaNets "
            "have 9: the anchors of others are not in their weights, so they cannot be converted"
        )
    if len(state[_LOGITS]) % num_anchors:
        raise ConfigError(
            f"{_LOGITS} has {len(state[_LOGITS])} channels, which is no multiple of {num_anchors}, "
            "the anchors at a location"
        )
    is_v2 = "head.classification_head.conv.0.1.weight" in state
    is_frozen = not any(name.endswith("num_batches_tracked") for name in state)
    if bn_eps is None:
        bn_eps = 0.0 if is_frozen and not is_v2 else _EPS
    converted = {
        _new_name(name, is_v2): _anchors_in_our_order(name, value)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    _fold_eps(converted, bn_eps)
    add_conv_biases(converted)
    num_classes = len(state[_LOGITS]) // num_anchors
    categories = list(RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    names = categories if num_classes == len(categories) else None
    notes = [
        f"Batch norm's eps is not in the file; {bn_eps:g} was taken"
        + (
            ", as torchvision does for its COCO weights of the first version and what is "
            "fine-tuned from them. A model that began with a backbone's weights alone has 1e-5: "
            "docs/models.md has the lines of Python that set it."
            if bn_eps == 0
            else "."
        ),
        "Classes have torchvision's numbers: 0 is its background, which is never a detection of "
        "trained weights"
        + (
            ", the others are COCO's category ids, of which ten are unused (N/A). An evaluation on "
            "COCO takes the 80 classes by name: set MODEL.RETINANET.NUM_CLASSES 80."
            if names
            else "."
        ),
        "Anchors are not in the file; torchvision's own were taken. If the model was given others, "
        "set MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS to them.",
    ]
    return Converted(converted, _config(state, converted, num_classes, is_v2), names, notes)


SOURCE = Source("torchvision", recognises, convert)


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and others put before every name."""
    (found, *_) = [name for name in state if name.endswith(_LOGITS)] or [""]
    prefix = found.removesuffix(_LOGITS)
    plain = {name.removeprefix(prefix): value for name, value in state.items()}
    for name in (_STEM, _P6, _LOGITS, _DELTAS):
        if name not in plain:
            raise ConfigError(
                f"not a RetinaNet of torchvision with levels P3 to P7: it has no {name}"
            )
    return plain


def _new_name(name: str, is_v2: bool) -> str:
    body, fpn = "backbone.body.", r"backbone\.fpn\."
    if name.startswith(body) and (resnet_name := torchvision_name(name.removeprefix(body))):
        return resnet_name
    if m := re.fullmatch(rf"{fpn}(inner|layer)_blocks\.([0-2])(?:\.0)?\.(weight|bias)", name):
        return f"backbone.fpn_{_FPN_PARTS[m[1]]}{int(m[2]) + 3}.{m[3]}"
    if m := re.fullmatch(rf"{fpn}extra_blocks\.(p[67])\.(weight|bias)", name):
        return f"backbone.top_block.{m[1]}.{m[2]}"
    if m := re.fullmatch(
        r"head\.(classification|regression)_head\.conv\.(\d)(?:\.([01]))?\.(weight|bias)", name
    ):
        # The first releases have conv.0, conv.2, ...: the ReLUs between them count.
        index, part = (int(m[2]) // 2, 0) if m[3] is None else (int(m[2]), int(m[3]))
        return f"head.{_SUBNETS[m[1]]}.{index * (3 if is_v2 else 2) + part}.{m[4]}"
    if m := re.fullmatch(r"head\.classification_head\.cls_logits\.(weight|bias)", name):
        return f"head.cls_score.{m[1]}"
    if m := re.fullmatch(r"head\.regression_head\.bbox_reg\.(weight|bias)", name):
        return f"head.bbox_pred.{m[1]}"
    raise ConfigError(
        f"{name} is not a name of torchvision's RetinaNets with a ResNet and levels P3 to P7: "
        "other models cannot be converted"
    )


_FPN_PARTS = {"inner": "lateral", "layer": "output"}
_SUBNETS = {"classification": "cls_subnet", "regression": "bbox_subnet"}


def _anchors_in_our_order(name: str, value: Tensor) -> Tensor:
    """The channels of the last convs; other tensors as they are."""
    if "cls_logits" not in name and "bbox_reg." not in name:
        return value
    return sizes_first(value, _NUM_RATIOS, _NUM_SIZES)


def _fold_eps(state: dict[str, Tensor], bn_eps: float) -> None:
    """Change the weights of the batch norms so that Detectron2's eps gives the same map."""
    if bn_eps == _EPS:
        return
    for name in [name for name in state if name.endswith("running_var")]:
        variance = state[name].double()
        if (variance + bn_eps <= 0).any():
            raise ConfigError(
                f"{name} has a variance of 0, which eps {bn_eps:g} makes infinite: the weights "
                "were trained with another eps, pass it as bn_eps (PyTorch's is 1e-5)"
            )
        weight = name.replace("running_var", "weight")
        factor = ((variance + _EPS) / (variance + bn_eps)).sqrt()
        state[weight] = (state[weight].double() * factor).to(state[weight].dtype)


def _config(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], num_classes: int, is_v2: bool
) -> dict[str, Any]:
    """What differs from ``retina_R50_800.yaml``."""
    channels = len(theirs[_P6])
    num_convs = sum(
        1
        for name, value in ours.items()
        if name.startswith("head.cls_subnet.") and value.dim() == 4
    )
    retinanet: dict[str, Any] = {
        "NUM_CLASSES": num_classes,
        # torchvision's own rule: with as many channels in as out, P6 is computed from P5
        "P6_SOURCE": "p5" if theirs[_P6].shape[1] == channels else "res5",
        "NORM": "GN" if is_v2 else "",
        "NUM_CONVS": num_convs,
        "LOW_QUALITY_MATCHES": "always",
        "SMOOTH_L1_LOSS_BETA": 0.0,
        "BBOX_REG_LOSS_TYPE": "giou" if is_v2 else "smooth_l1",
        "BOXES_OUTSIDE_TEST": "clip",
    }
    return {
        "_BASE_": "retina_R50_800.yaml",
        "MODEL": {
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": {**resnet_config(ours), "STRIDE_IN_1X1": False},
            "FPN": {"OUT_CHANNELS": channels},
            "ANCHOR_GENERATOR": {"NAME": "TorchvisionAnchorGenerator", "SIZES": _SIZES},
            "RETINANET": retinanet,
        },
        "INPUT": {"FORMAT": "RGB", "RESIZE": "torchvision"},
        "TEST": {"DETECTIONS_PER_IMAGE": 300},
    }
