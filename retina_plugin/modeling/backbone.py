"""FPN with levels P3 to P7 on a ResNet or ResNeXt (section 4 and its footnote 2)."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from .pyramid import build_pyramid, p6_source

__all__ = ["build_retina_fpn_backbone"]

# Depth -> blocks of each stage, for the ResNets of two-conv blocks.
_BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_retina_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet-18/34/50/101/152 or ResNeXt (``MODEL.RESNETS``) and an FPN with levels P3 to P7.

    P6 is a 3x3 stride-2 conv on C5 (``P6_SOURCE: res5``, the paper) or on P5 (``p5``, torchvision's
    first RetinaNet); P7 is a 3x3 stride-2 conv on ReLU(P6), or on P6 (``RELU_BEFORE_P7: False``,
    MMDetection). With ``res5`` the parameters are those of Detectron2's
    ``build_retinanet_resnet_fpn_backbone``, so its weights load.

    Raises:
        ConfigError: an unknown ``P6_SOURCE``.
    """
    p6_source(cfg)  # an unknown one raises before the backbone is built
    if cfg.MODEL.RESNETS.DEPTH in _BASIC_BLOCKS:
        bottom_up = _build_basic_resnet(cfg, input_shape)
    else:
        bottom_up = build_resnet_backbone(cfg, input_shape)
    return build_pyramid(cfg, bottom_up)


def _build_basic_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-18/34 of any width; Detectron2's builder takes ``RES2_OUT_CHANNELS`` 64 only."""
    resnets = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    stages = []
    for stage, num_blocks in enumerate(_BASIC_BLOCKS[resnets.DEPTH]):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if stage == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=resnets.NORM,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
    return ResNet(
        stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
