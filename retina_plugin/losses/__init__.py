"""Losses of the dense detector; plain PyTorch, without Detectron2."""

from .classification import CLS_LOSS_REGISTRY, ClassificationLoss, CrossEntropy, FocalLoss
from .dense import DenseLoss, DenseTargets, dense_classification_loss
from .regression import BOX_LOSS_REGISTRY

__all__ = [
    "BOX_LOSS_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "ClassificationLoss",
    "CrossEntropy",
    "DenseLoss",
    "DenseTargets",
    "FocalLoss",
    "dense_classification_loss",
]
