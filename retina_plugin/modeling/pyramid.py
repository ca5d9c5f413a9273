"""The pyramid on top of a backbone: P3 to P7 (section 4 and its footnote 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from retina_plugin.config import KEYS
from retina_plugin.errors import check_choice

__all__ = ["TopLevels", "build_pyramid", "freeze_unused_levels", "p6_source"]


class TopLevels(LastLevelP6P7):
    """Detectron2's P6 and P7: two 3x3 convs of stride 2, the second one on ReLU(P6).

    Args:
        in_channels: of the feature that P6 is computed from.
        out_channels: of P6 and P7.
        in_feature: its name.
        relu_before_p7: False for MMDetection's models, whose second conv is on P6 itself.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_feature: str = "res5",
        *,
        relu_before_p7: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, in_feature)
        self.relu_before_p7 = relu_before_p7

    def forward(self, feature: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> [P6, P7], of half and a quarter of the height and width, rounded up."""
        p6 = self.p6(_two_wide(feature))
        return [p6, self.p7(_two_wide(F.relu(p6) if self.relu_before_p7 else p6))]


# Top blocks of which it is known what they compute from what.
_TOP_BLOCKS = (TopLevels, LastLevelP6P7, LastLevelMaxPool, type(None))


def _two_wide(feature: Tensor) -> Tensor:
    """A map of one column with a column of zeros beside it, which a conv of stride 2 ignores.

    On a CPU in bfloat16, PyTorch 2.15 takes the results of a strided 3x3 conv on one column from
    memory that nobody wrote: forward, and in the gradient of its weights. P6 has one column in
    images of up to 64 pixels.
    """
    on_cpu = feature.device.type == "cpu"
    is_16_bit = feature.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return F.pad(feature, (0, 1)) if on_cpu and is_16_bit and feature.shape[3] == 1 else feature


def p6_source(cfg: CfgNode) -> str:
    """``P6_SOURCE``: "res5" or "p5".

    Raises:
        ConfigError: it is another value.
    """
    key = "MODEL.RETINANET.P6_SOURCE"
    check_choice(key, cfg.MODEL.RETINANET.P6_SOURCE, KEYS[key].choices)
    return str(cfg.MODEL.RETINANET.P6_SOURCE)


def build_pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """FPN with levels P3 to P7 on the features ``MODEL.FPN.IN_FEATURES`` of ``bottom_up``.

    Raises:
        ConfigError: an unknown ``P6_SOURCE``.
    """
    source, channels = p6_source(cfg), cfg.MODEL.FPN.OUT_CHANNELS
    top = TopLevels(
        bottom_up.output_shape()[source].channels if source == "res5" else channels,
        channels,
        source,
        relu_before_p7=cfg.MODEL.RETINANET.RELU_BEFORE_P7,
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def freeze_unused_levels(backbone: Backbone, levels: Iterable[str]) -> Backbone:
    """``backbone``, of whose pyramid the convs that none of ``levels`` depends on are frozen.

    They never get a gradient, and DistributedDataParallel would wait for it. Only the pyramids of
    this package and of Detectron2 are changed. A backbone of your own stays as it is.

    Args:
        levels: the names of the features that are used ("p3").
    """
    if type(backbone) is not FPN or type(backbone.top_block) not in _TOP_BLOCKS:
        return backbone
    used, names, top = set(levels), list(backbone.output_shape()), backbone.top_block
    unused: list[nn.Module] = []
    if isinstance(top, LastLevelP6P7):
        p6, p7 = names[-2:]
        unused += [] if p7 in used else [top.p7]
        unused += [] if {p6, p7} & used else [top.p6]  # P7 is computed from P6
    if top is not None and set(names[-top.num_levels :]) & used:
        used.add(top.in_feature)  # "res5" is no level
    is_needed = False  # the sum that a level is computed from, by it or by one of finer resolution
    finest_first = zip(names, backbone.lateral_convs[::-1], backbone.output_convs[::-1])
    for name, lateral, output in finest_first:
        is_needed = is_needed or name in used
        unused += [] if name in used else [output]
        unused += [] if is_needed else [lateral]
    for module in unused:
        module.requires_grad_(False)
    return backbone
