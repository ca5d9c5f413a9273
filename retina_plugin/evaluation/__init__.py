"""Evaluators that the trainer hooks in, chosen by ``TEST.EVALUATORS``."""

from .coco import EVALUATOR_REGISTRY, COCOEvaluator, FastCOCOEvaluator
from .evaluators import build_evaluators

__all__ = ["EVALUATOR_REGISTRY", "COCOEvaluator", "FastCOCOEvaluator", "build_evaluators"]
