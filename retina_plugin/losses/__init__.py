"""Losses of the dense detector and their kernels. Nothing here imports Detectron2."""

from .backends.select import check_backend
from .classification import (
    CLS_LOSS_REGISTRY,
    ClassificationLoss,
    CrossEntropy,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
)
from .dense import (
    DenseLoss,
    anchor_losses,
    dense_classification_loss,
)
from .regression import BOX_LOSS_REGISTRY, BoxLoss
from .sampled import sampled_classification_loss
from .targets import DenseTargets

__all__ = [
    "BOX_LOSS_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "BoxLoss",
    "ClassificationLoss",
    "CrossEntropy",
    "DenseLoss",
    "DenseTargets",
    "FocalLoss",
    "FocalLossStar",
    "HingeLoss",
    "anchor_losses",
    "check_backend",
    "dense_classification_loss",
    "sampled_classification_loss",
]
