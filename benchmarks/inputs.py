"""Inputs that several stages share: the paper's anchors, random boxes, configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from torch import Tensor

from retina_plugin import get_config_file
from retina_plugin.engine import setup_cfg

__all__ = [
    "IMAGE_SIZE",
    "LEVELS",
    "TRANSFORM",
    "A",
    "K",
    "Levels",
    "Records",
    "anchors_of",
    "assert_near",
    "boxes_in_image",
    "model_cfg",
    "spread_scores",
]

Levels = Sequence[tuple[int, int]]  # height and width of each pyramid level
Records = list[dict[str, Any]]  # images as Detectron2's models and evaluators take and give them

K, A = 80, 9  # classes of COCO; anchors of a location
# P3 to P7 of an image of 800 x 1344 pixels: 201,600 anchors
LEVELS: Levels = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
IMAGE_SIZE = (800, 1344)
TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


def anchors_of(device: str, levels: Levels = LEVELS) -> list[Boxes]:
    """The paper's anchors on levels P3 to P7 of these heights and widths."""
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16, 32, 64, 128]
    )
    return generator.to(device)([torch.empty(1, 1, h, w, device=device) for h, w in levels])


def boxes_in_image(count: int, generator: torch.Generator, device: str) -> Tensor:
    """(count, 4) boxes XYXY with sides of 10 to 400 pixels, log-uniform: small ones prevail."""
    height, width = IMAGE_SIZE
    size = 10 * 40 ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], dim=1).to(device)


def model_cfg(name: str, device: str) -> CfgNode:
    """A config of Table 1e with Detectron2's protocol, so that both models compute the same."""
    cfg = setup_cfg(get_config_file(f"retina_{name}.yaml"))
    protocol = get_config_file("_base_/protocol_detectron2.yaml")
    cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(protocol)))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.VIS_PERIOD = device, "", 0
    return cfg


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Equal up to the relative tolerance ``rtol``, without an absolute one."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=0)


def spread_scores(model: Any, image: Tensor) -> None:
    """Make a random head detect: the best 300 of its logits in an image are above the threshold."""
    generator = torch.Generator().manual_seed(0)
    head = model.head
    head.bbox_pred.weight.normal_(std=0.002, generator=generator)
    head.cls_score.weight.normal_(std=0.05, generator=generator)
    features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    logits = torch.cat(
        [x.flatten() for x in head([features[n] for n in model.head_in_features])[0]]
    )
    logits = logits - head.cls_score.bias[0]
    scale = 2.0 / logits.std()
    head.cls_score.weight.mul_(scale)
    head.cls_score.bias.fill_(-2.9 - float((logits * scale).topk(300).values[-1]))
