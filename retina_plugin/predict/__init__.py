"""Detect with a trained model: images, folders, videos, and images too large for one pass."""

from .predictions import Predictions
from .predictor import RetinaPredictor

__all__ = ["Predictions", "RetinaPredictor"]
