"""Matching: the ground-truth boxes of one image to 201,600 anchors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.ops import box_iou

from benchmarks.case import Case
from benchmarks.inputs import anchors_of, boxes_in_image
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling import AnchorMatcher

__all__ = ["matching"]


def matching(device: str) -> Iterator[Case]:
    """From one box to a crowded image."""
    anchors_R4 = Boxes.cat(anchors_of(device)).tensor
    for count in (1, 20, 100, 500):
        gt = boxes_in_image(count, torch.Generator().manual_seed(0), device)
        yield _matching_case(gt, anchors_R4)


def _matching_case(gt: Tensor, anchors_R4: Tensor) -> Case:
    detectron2_matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    torchvision_matcher = torchvision_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    our_matcher = AnchorMatcher((0.4, 0.5), (0, -1, 1))

    def detectron2() -> Any:
        return detectron2_matcher(pairwise_iou(Boxes(gt), Boxes(anchors_R4)))

    def torchvision() -> Any:
        return torchvision_matcher(box_iou(gt, anchors_R4))

    def ours() -> Any:
        return our_matcher(gt, anchors_R4)

    def check(results: dict[str, Any]) -> str:
        index, label = results["detectron2"]
        assert torch.equal(results["ours"].gt, index)
        # Detectron2: 1 matched, 0 background, -1 ignored; ours: 0 matched, BACKGROUND, IGNORED
        expected = torch.where(label == 1, 0, torch.where(label == 0, BACKGROUND, IGNORED))
        assert torch.equal(results["ours"].label, expected)
        # torchvision gives one number: the index of the box, -1 for background, -2 for ignored
        expected = torch.where(label == 1, index, torch.where(label == 0, -1, -2))
        assert torch.equal(results["torchvision"], expected)
        return "labels and boxes of all three equal to the bit"

    implementations = {"detectron2": detectron2, "torchvision": torchvision, "ours": ours}
    return Case("matching", f"{len(gt)} boxes, {len(anchors_R4):,} anchors", implementations, check)
