"""Several evaluators in one pass over the images."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from .coco import EVALUATOR_REGISTRY

__all__ = ["Evaluators", "build_evaluators"]

logger = logging.getLogger("retina_plugin")


class Evaluators(DatasetEvaluators):
    """Detectron2's class, except that two evaluators may have results under the same key.

    Detectron2 ends the evaluation there, and with it the training. Here the later evaluator's are
    kept under its own name: ``bbox`` of a second COCO evaluator becomes ``bbox_COCOEvaluator``.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        super().__init__(list(evaluators))
        self._warned: set[str] = set()

    def evaluate(self) -> dict[str, Any]:
        """The results of all; empty on every process but the first."""
        results: dict[str, Any] = OrderedDict()
        for evaluator in self._evaluators:
            found = evaluator.evaluate()
            for key, value in found.items() if isinstance(found, Mapping) else ():
                name = key
                if key in results:
                    name = f"{key}_{type(evaluator).__name__}"
                    if name not in self._warned:
                        logger.warning(
                            "two of TEST.EVALUATORS give results named %s: those of the later one "
                            "are logged as %s",
                            *(key, name),
                        )
                        self._warned.add(name)
                results[name] = value
        return results


def build_evaluators(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The evaluators that ``TEST.EVALUATORS`` names, in their order, as one evaluator.

    Args:
        dataset_name: a registered dataset.
        output_dir: where their files go.

    Raises:
        ConfigError: nothing is registered under a name.

    Example::

        inference_on_dataset(model, loader, build_evaluators(cfg, "coco_2017_val", "output"))
    """
    evaluators = [
        EVALUATOR_REGISTRY.build_named(name, cfg, dataset_name, output_dir)
        for name in cfg.TEST.EVALUATORS
    ]
    return evaluators[0] if len(evaluators) == 1 else Evaluators(evaluators)
