"""Evaluators that the trainer hooks in, chosen by ``TEST.EVALUATOR``."""

from __future__ import annotations

from typing import Any

from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator

from retina_plugin.registry import ComponentRegistry

__all__ = ["EVALUATOR_REGISTRY", "COCOEvaluator"]

# Entries are Detectron2 ``DatasetEvaluator``s; from_config(cfg, dataset_name, output_dir).
EVALUATOR_REGISTRY = ComponentRegistry("TEST.EVALUATOR")


@EVALUATOR_REGISTRY.register()
class COCOEvaluator(Detectron2COCOEvaluator):
    """Detectron2's COCO evaluator: AP over IoU .50:.95, AP50, AP75, APs, APm, APl, by class.

    It also writes ``coco_instances_results.json``; for a dataset without annotations, such as
    test-dev, that file is the result: what the COCO server takes.
    """

    @classmethod
    def from_config(cls, cfg: Any, dataset_name: str, output_dir: str) -> dict[str, Any]:
        return {
            "dataset_name": dataset_name,
            "tasks": ("bbox",),
            "output_dir": output_dir,
        }
