"""The report as an evaluator of a training."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from retina_plugin.evaluation import EVALUATOR_REGISTRY, FastCOCOEvaluator

from .ground_truth import GroundTruth
from .metrics import analyze
from .page import write_report

__all__ = ["ReportEvaluator"]

logger = logging.getLogger("retina_plugin")


@EVALUATOR_REGISTRY.register()
class ReportEvaluator(FastCOCOEvaluator):
    """Writes the page of ``retina report`` after each evaluation, in the place of the last one.

    It stands beside an evaluator that computes AP:
    ``TEST.EVALUATORS: ("FastCOCOEvaluator", "ReportEvaluator")``. The page and its JSON are in
    ``OUTPUT_DIR/inference/DATASET_NAME/``.

    Args: see :class:`.FastCOCOEvaluator`. Without an ``output_dir`` there is no page.
    """

    PACKAGES = ("hotcoco", "plotly")  # checked before a training starts

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """{"errors": {"Cls": ..., "Loc": ..., ...}}: the AP50 that each type of error costs.

        In points of AP50, by TIDE's definitions (Bolya et al., ECCV 2020). Empty on every process
        but the first, and if the dataset has no annotations.

        Args:
            img_ids: must be None: a report is one of all images.

        Raises:
            ConfigError: see :func:`.analyze`.
        """
        assert img_ids is None
        predictions = self.gather()
        if not predictions or not self._do_evaluation:
            return {}
        category_ids = self.category_ids(predictions)
        results = itertools.chain(*(p.to_json(category_ids) for p in predictions))
        root = self._metadata.get("image_root") or ""
        truth = GroundTruth.from_coco(self._coco_api.dataset, self._dataset_name, root)
        analysis = analyze(truth, list(results))
        if self._output_dir:
            page = write_report(analysis, self._output_dir)
            logger.info("%-11s %s", "Report", page)
        return {"errors": {error.name: error.cost for error in analysis.errors}}
