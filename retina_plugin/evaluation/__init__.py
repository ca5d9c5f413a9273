"""Evaluators that the trainer hooks in, chosen by ``TEST.EVALUATOR``."""

from .coco import EVALUATOR_REGISTRY, COCOEvaluator, FastCOCOEvaluator

__all__ = ["EVALUATOR_REGISTRY", "COCOEvaluator", "FastCOCOEvaluator"]
