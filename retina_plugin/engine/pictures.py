"""Pictures of detections in the event storage after each evaluation, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from . import report
from .writers import Writers

__all__ = ["EvaluationPictures"]

_NUM_IMAGES = 4


class EvaluationPictures(HookBase):
    """After each evaluation, draws some images of the first test set: always the same ones.

    Ground truth and detections look as in ``detections.png``. The pictures are named
    ``detections/1_FILE``, ... Nothing is drawn if no writer reads pictures, and no random number.

    Args:
        cfg: of the training.
        writers: the hook that comes after this one.
    """

    def __init__(self, cfg: CfgNode, writers: Writers) -> None:
        self._cfg, self._writers = cfg, writers
        self._records: list[dict[str, Any]] | None = None

    def before_train(self) -> None:
        self._evaluation: Mapping[str, Any] = self.trainer.last_evaluation

    def after_step(self) -> None:
        if self.trainer.last_evaluation is not self._evaluation:
            self._evaluation = self.trainer.last_evaluation
            if self._cfg.DATASETS.TEST and self._writers.show_pictures():
                # "$" in a class's name is a dollar, not the start of a formula.
                no_formulas = matplotlib.rc_context({"text.parse_math": False})
                with report.survive_drawing("a picture of detections"), no_formulas:
                    self._draw()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self.after_step()

    def _draw(self) -> None:
        name = self._cfg.DATASETS.TEST[0]
        if self._records is None:  # to read all annotations again would take seconds
            self._records = report.choose_evenly(DatasetCatalog.get(name), _NUM_IMAGES)
        names = MetadataCatalog.get(name).get("thing_classes")
        pictures = report.draw_images(self._cfg, self.trainer.model, self._records, names)
        for number, (record, picture) in enumerate(zip(self._records, pictures), 1):
            title = f"detections/{number}_{Path(record['file_name']).stem}"
            self.trainer.storage.put_image(title, picture.transpose(2, 0, 1))
