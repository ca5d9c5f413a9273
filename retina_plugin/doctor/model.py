"""Whether the model of a config can be built, in a moment and without its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from retina_plugin.errors import ConfigError, check_choice, did_you_mean

from .findings import Finding, Severity

__all__ = ["build_without_memory", "check_detector", "check_model", "check_parts"]

T = TypeVar("T")

_TIMM = "build_timm_retina_fpn_backbone"
# Builders that read MODEL.FPN -> the levels that they put on top of it.
_TOP_LEVELS = {
    "build_resnet_fpn_backbone": 1,
    "build_retina_fpn_backbone": 2,
    "build_retinanet_resnet_fpn_backbone": 2,
    _TIMM: 2,
}
_STAGES = ("res2", "res3", "res4", "res5")
_GROUPS = 32  # of Detectron2's GN


def build_without_memory(build: Callable[[], T]) -> T:
    """What ``build`` returns, on PyTorch's meta device if that is possible.

    It is not for a module whose constructor reads the numbers of a tensor. Then it is built as it
    is, and what that raises is raised.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return build()


def check_model(cfg: CfgNode) -> Iterator[Finding]:
    """Every component that a config names exists, and they fit together."""
    unknown = list(check_detector(cfg))
    if unknown:
        yield from unknown
        return
    try:
        build_without_memory(lambda: META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg))
    except ConfigError as error:
        key, _, what = str(error).partition(": ")
        if not key.startswith("MODEL.") or " " in key:
            key, what = "MODEL", str(error)
        yield Finding(Severity.ERROR, key, what)
    except Exception as error:  # of Detectron2 or of a component of the user's
        text = " ".join(str(error).split())
        yield Finding(
            Severity.ERROR, "MODEL", f"the model cannot be built: {type(error).__name__}: {text}"
        )


def check_detector(cfg: CfgNode) -> Iterator[Finding]:
    """``MODEL.META_ARCHITECTURE`` is registered."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        known = [known for known, _ in META_ARCH_REGISTRY]
        yield Finding(
            Severity.ERROR,
            "MODEL.META_ARCHITECTURE",
            f"no detector '{name}' is registered{did_you_mean(name, known)}",
            "set FocalRetinaNet, or register yours in a file of IMPORTS",
        )


def check_parts(cfg: CfgNode) -> Iterator[Finding]:
    """The backbone of a RetinaNet exists, and pyramid and head fit it. Nothing is built.

    Of a backbone of the user's own only that it is registered.
    """
    known = [name for name, _ in BACKBONE_REGISTRY]
    yield from _unknown("MODEL.BACKBONE.NAME", [cfg.MODEL.BACKBONE.NAME], known)
    yield from _check_features(cfg)
    yield from _check_group_norm(cfg)


def _check_features(cfg: CfgNode) -> Iterator[Finding]:
    """The pyramid's features are the ResNet's, and the head's levels are the pyramid's."""
    builder, inputs = cfg.MODEL.BACKBONE.NAME, list(cfg.MODEL.FPN.IN_FEATURES)
    if builder not in _TOP_LEVELS:
        return
    given, key = list(cfg.MODEL.RESNETS.OUT_FEATURES), "MODEL.RESNETS.OUT_FEATURES"
    unknown = list(_unknown("MODEL.FPN.IN_FEATURES", inputs, _STAGES))
    if builder != _TIMM:  # whose features are those that the pyramid needs
        unknown += _unknown(key, given, ("stem", *_STAGES))
    if unknown or not inputs:
        yield from unknown
        return
    needed = set(inputs)
    if _TOP_LEVELS[builder] == 2 and cfg.MODEL.RETINANET.P6_SOURCE == "res5":
        needed.add("res5")
    lacking = sorted(needed - set(given))
    if lacking and builder != _TIMM:
        what = f"{given} lacks {', '.join(lacking)}, which the pyramid is built on"
        yield Finding(Severity.ERROR, key, what, f"set it to {sorted(needed | set(given))}")
    first, last = (int(name.removeprefix("res")) for name in (min(inputs), max(inputs)))
    levels = [f"p{level}" for level in range(first, last + _TOP_LEVELS[builder] + 1)]
    yield from _unknown("MODEL.RETINANET.IN_FEATURES", cfg.MODEL.RETINANET.IN_FEATURES, levels)


def _check_group_norm(cfg: CfgNode) -> Iterator[Finding]:
    """Channels can be divided into the groups of GN."""
    model = cfg.MODEL
    fpn, resnet, retinanet = model.FPN, model.RESNETS, model.RETINANET
    channels = []  # (key of the norm, the norm, key of the channels, their number)
    if model.BACKBONE.NAME in _TOP_LEVELS:
        channels.append(("MODEL.FPN.NORM", fpn.NORM, "MODEL.FPN.OUT_CHANNELS", fpn.OUT_CHANNELS))
        if retinanet.HEAD == "RetinaHead" and retinanet.NUM_CONVS > 0:
            channels.append(("MODEL.RETINANET.NORM", retinanet.NORM, *channels[0][2:]))
    if model.BACKBONE.NAME in {*_TOP_LEVELS, "build_resnet_backbone"} - {_TIMM}:
        for name in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS"):
            key = f"MODEL.RESNETS.{name}"
            channels.append(("MODEL.RESNETS.NORM", resnet.NORM, key, resnet[name]))
    for key, norm, of, number in channels:
        if norm == "GN" and number % _GROUPS:
            what = f"GN has {_GROUPS} groups, into which {of} {number} cannot be divided"
            nearest = max(1, round(number / _GROUPS)) * _GROUPS
            yield Finding(Severity.ERROR, key, what, f"set {of} {nearest}, or another norm")


def _unknown(key: str, names: Iterable[str], known: Sequence[str]) -> Iterator[Finding]:
    """The first of ``names`` that is not known."""
    for name in names:
        try:
            check_choice(key, name, known)
        except ConfigError as error:
            yield Finding(Severity.ERROR, key, str(error).removeprefix(f"{key}: "))
            return
