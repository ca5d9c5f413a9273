"""Box losses of the dense detector, chosen by ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE``.

A box loss maps P predictions and their targets to (P,) losses. ``on`` says what it compares:
"deltas", the (dx, dy, dw, dh) of R-CNN's parameterisation (section 4, "Box Regression Subnet"),
or "boxes", decoded XYXY boxes in pixels. The IoU losses are torchvision's; they are maintained, and
equal to those of fvcore and Detectron2.

    @BOX_LOSS_REGISTRY.register()
    class MyBoxLoss(BoxLoss):
        def __call__(self, prediction_P4, target_P4):
            return (prediction_P4 - target_P4).square().sum(dim=1)
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision import ops  # GIoU, DIoU and CIoU

from retina_plugin.errors import ConfigError
from retina_plugin.registry import ComponentRegistry

__all__ = ["BOX_LOSS_REGISTRY", "L1", "BoxLoss", "CIoU", "DIoU", "GIoU", "SmoothL1"]

# Entries are subclasses of BoxLoss.
BOX_LOSS_REGISTRY = ComponentRegistry(
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE",
    aliases={  # the values of Detectron2's key
        "smooth_l1": "SmoothL1",
        "l1": "L1",
        "giou": "GIoU",
        "diou": "DIoU",
        "ciou": "CIoU",
    },
)


class BoxLoss:
    """Base of the box losses: called with (prediction_P4, target_P4), returns (P,) losses.

    Attributes:
        on: what is compared, "deltas" (the default) or "boxes".
        elementwise: each loss depends on its own row alone, and computing it does not synchronise
            with the GPU. The detector then evaluates the loss under a mask instead of selecting
            rows. Not inherited, because an override may break it: every class declares it itself.
    """

    on = "deltas"
    elementwise = False

    def is_elementwise(self) -> bool:
        """``elementwise`` if this very class declares it, else False."""
        return bool(vars(type(self)).get("elementwise", False))

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        raise NotImplementedError  # abstract: every loss defines it

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        args = ", ".join(f"{k}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__}({args})"


@BOX_LOSS_REGISTRY.register()
class SmoothL1(BoxLoss):
    """Smooth L1, summed over the four deltas: .5 d^2 / beta if |d| < beta, else |d| - .5 beta.

    d is the predicted minus the target delta.

    Args:
        beta: where the parabola ends (``SMOOTH_L1_LOSS_BETA``); 0 is L1. The paper says "the
            standard smooth L1 loss" (beta 1 in Fast R-CNN, [10]); Detectron has .11.

    Raises:
        ConfigError: negative beta.
    """

    elementwise = True

    def __init__(self, beta: float = 0.1) -> None:
        if beta < 0:
            raise ConfigError(f"MODEL.RETINANET.SMOOTH_L1_LOSS_BETA must be >= 0, got {beta}")
        self.beta = float(beta)

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        loss = F.smooth_l1_loss(prediction_P4, target_P4, reduction="none", beta=self.beta)
        return loss.sum(dim=1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"beta": cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA}


@BOX_LOSS_REGISTRY.register()
class L1(BoxLoss):
    """|d|, summed over the four deltas."""

    elementwise = True

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        return F.l1_loss(prediction_P4, target_P4, reduction="none").sum(dim=1)


@BOX_LOSS_REGISTRY.register()
class GIoU(BoxLoss):
    """1 - GIoU of the decoded boxes (Rezatofighi et al., CVPR 2019)."""

    on = "boxes"

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        return ops.generalized_box_iou_loss(prediction_P4, target_P4)


@BOX_LOSS_REGISTRY.register()
class DIoU(BoxLoss):
    """1 - IoU + (centre distance / enclosing diagonal)^2 (Zheng et al., AAAI 2020)."""

    on = "boxes"

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        return ops.distance_box_iou_loss(prediction_P4, target_P4)


@BOX_LOSS_REGISTRY.register()
class CIoU(BoxLoss):
    """1 - IoU + DIoU's distance term + a term of the aspect ratio (Zheng et al., AAAI 2020)."""

    on = "boxes"

    def __call__(self, prediction_P4: Tensor, target_P4: Tensor) -> Tensor:
        return ops.complete_box_iou_loss(prediction_P4, target_P4)
