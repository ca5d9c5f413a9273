"""The two subnets on every pyramid level (section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import Tensor, nn

from retina_plugin.errors import ConfigError
from retina_plugin.registry import ComponentRegistry

__all__ = ["RETINANET_HEAD_REGISTRY", "RetinaHead", "prior_bias"]

# Entries are modules called with L features that return (logits, deltas), each a list of L tensors:
# (N, A*K, Hi, Wi) and (N, A*4, Hi, Wi).
RETINANET_HEAD_REGISTRY = ComponentRegistry("MODEL.RETINANET.HEAD")


def prior_bias(pi: float) -> float:
    """b = -log((1 - pi) / pi), so that sigmoid(b) = pi (section 4.1, "Initialization").

    Args:
        pi: the prior probability of the rare class; .5 gives the usual bias 0.

    Raises:
        ConfigError: pi not in (0, 1).
    """
    if not 0.0 < pi < 1.0:
        raise ConfigError(f"MODEL.RETINANET.PRIOR_PROB must be in (0, 1), got {pi}")
    return -math.log((1.0 - pi) / pi)


@RETINANET_HEAD_REGISTRY.register()
class RetinaHead(nn.Module):
    """Classification and box subnet: ``num_convs`` 3x3 convs with ReLU, then a 3x3 conv.

    The two subnets have the same structure and separate parameters; all levels share them.
    Parameter names are those of Detectron2's ``RetinaNetHead``. Weights are Gaussian with sigma
    .01 and biases are 0, except for the last classification conv, whose bias is :func:`prior_bias`.

    Args:
        in_channels: C, channels of the features.
        num_levels: L; a "BN" norm has its own statistics for each level.
        num_classes: K.
        num_anchors: A, the same on every level.
        num_convs: convs before the last one (4 in the paper).
        channels: channels of these convs; None for C, as in the paper.
        norm: "" for none (the paper), or a name that Detectron2's ``get_norm`` accepts.
        prior_prob: pi, see :func:`prior_bias`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_levels: int,
        num_classes: int,
        num_anchors: int,
        num_convs: int = 4,
        channels: int | None = None,
        norm: str = "",
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        make_norm = _level_norm(norm, num_levels)

        def subnet() -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in range(num_convs):
                layers.append(_conv(in_channels if i == 0 else channels, channels))
                if make_norm:
                    layers.append(get_norm(make_norm, channels))
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        last_channels = channels if num_convs else in_channels
        self.cls_subnet = subnet()
        self.bbox_subnet = subnet()
        self.cls_score = _conv(last_channels, num_anchors * num_classes)
        self.bbox_pred = _conv(last_channels, num_anchors * 4)
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, prior_bias(prior_prob))
        self.num_levels = num_levels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        """Arguments from ``MODEL.RETINANET``, A from the anchors of ``MODEL.ANCHOR_GENERATOR``.

        Raises:
            ConfigError: the levels have different numbers of anchors.
        """
        num_anchors = build_anchor_generator(cfg, list(input_shape)).num_cell_anchors
        if len(set(num_anchors)) != 1:
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR gives {num_anchors} anchors a location on the levels: all "
                "levels share the head, so they need the same number"
            )
        return {
            "in_channels": input_shape[0].channels,
            "num_levels": len(input_shape),
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": num_anchors[0],
            "num_convs": cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L features (N, C, Hi, Wi) -> logits (N, A*K, Hi, Wi) and deltas (N, A*4, Hi, Wi)."""
        if len(features) != self.num_levels:
            raise ValueError(f"the head is for {self.num_levels} levels, not {len(features)}")
        logits = [self.cls_score(self.cls_subnet(f)) for f in features]
        deltas = [self.bbox_pred(self.bbox_subnet(f)) for f in features]
        return logits, deltas


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None  # for the type checker
    nn.init.zeros_(conv.bias)
    return conv


def _level_norm(norm: str, num_levels: int) -> str | Callable[[int], nn.Module]:
    # The activations of the levels differ in scale, so each level needs its own batch statistics.
    # Detectron2 does it with this class, so the parameter names are the same.
    if norm not in ("BN", "SyncBN"):
        return norm
    bn_class = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
    return lambda channels: CycleBatchNormList(num_levels, bn_class, num_features=channels)
