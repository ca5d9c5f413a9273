"""What a model gets wrong: the numbers and the page of ``retina report``."""

from .evaluator import ReportEvaluator
from .ground_truth import GroundTruth
from .metrics import analyze
from .page import write_report
from .result import Analysis

__all__ = ["Analysis", "GroundTruth", "ReportEvaluator", "analyze", "write_report"]
