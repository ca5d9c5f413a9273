"""COCO's metrics: Detectron2's evaluator, and one with equal numbers in a fiftieth of the time."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets, _evaluate_predictions_on_coco
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.errors import ConfigError
from retina_plugin.registry import ComponentRegistry

from .detections import Detections, as_rows, optional_import, prepare_truth

__all__ = ["EVALUATOR_REGISTRY", "COCOEvaluator", "FastCOCOEvaluator"]

# Entries are Detectron2 ``DatasetEvaluator``s with from_config(cfg, dataset_name, output_dir).
EVALUATOR_REGISTRY = ComponentRegistry("TEST.EVALUATORS")

logger = logging.getLogger("retina_plugin")

hotcoco = optional_import("hotcoco")  # of the extra "fast"


@EVALUATOR_REGISTRY.register()
class COCOEvaluator(Detectron2COCOEvaluator):
    """Detectron2's COCO evaluator: AP (IoU .50:.95), AP50, AP75, APs, APm, APl, per-class AP.

    It also writes ``coco_instances_results.json``, the file that the COCO server takes. For a
    dataset without annotations, such as test-dev, that file is the only result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        prepare_truth(self._coco_api)

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> dict[str, Any]:
        return {
            "dataset_name": dataset_name,
            "tasks": ("bbox",),
            "output_dir": output_dir,
            # The ground truth of an earlier run must not stand for a dataset that has changed.
            "allow_cached_coco": False,
        }

    def evaluate(self, img_ids: Sequence[int] | None = None) -> Any:
        """Detectron2's; what pycocotools prints is logged as a detail instead."""
        with _log_prints():
            return super().evaluate(img_ids)


@EVALUATOR_REGISTRY.register()
class FastCOCOEvaluator(Detectron2COCOEvaluator):
    """:class:`COCOEvaluator` for boxes, with hotcoco's matching where it is installed.

    All metrics equal pycocotools' to the last bit, and ``coco_instances_results.json`` has the
    same numbers. hotcoco computes the precision and recall arrays, and pycocotools' own code
    summarizes them. Without hotcoco, or where its numbers would differ, pycocotools does all; the
    log says which of the two ran, and why.

    Detections are kept as arrays instead of one dict each, and orjson writes them if it is
    installed. ``instances_predictions.pth`` is not written: it has what the JSON file has.

    Peer: ``detectron2.evaluation.COCOEvaluator``.

    Args:
        dataset_name: a registered dataset, in COCO's or Detectron2's format.
        output_dir: folder that the detections are written to; None to write none.
        distributed: collect the detections of all processes.
        max_dets_per_image: how many detections of an image count, by score; None for COCO's 100.

    Example::

        inference_on_dataset(model, loader, FastCOCOEvaluator("coco_2017_val"))["bbox"]["AP"]
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        max_dets_per_image: int | None = None,
    ) -> None:
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=False,
            allow_cached_coco=False,  # it may be that of a dataset that has changed
        )
        prepare_truth(self._coco_api)
        self._dataset_name = dataset_name
        self._predictions: list[Detections] = []

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> dict[str, Any]:
        return {"dataset_name": dataset_name, "output_dir": output_dir}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep the ``instances`` of ``outputs``, each with the ``image_id`` of its input.

        Raises:
            ConfigError: an output has masks, keypoints or proposals, which are not evaluated here.
        """
        for record, output in zip(inputs, outputs):
            if "proposals" in output:
                self._raise_unsupported("proposals")
            if "instances" in output:
                self._predictions.append(self._detections(record["image_id"], output["instances"]))

    def _detections(self, image_id: int | str, instances: Instances) -> Detections:
        for field in ("pred_masks", "pred_keypoints"):
            if instances.has(field):
                self._raise_unsupported(field)
        boxes = instances.pred_boxes.tensor.cpu().numpy().copy()
        boxes[:, 2:] -= boxes[:, :2]
        # float64, as in the JSON file: it represents every float32 and bfloat16
        scores = instances.scores.cpu().double().numpy()
        return Detections(image_id, boxes, scores, instances.pred_classes.cpu().numpy())

    def _raise_unsupported(self, what: str) -> None:
        raise ConfigError(
            f"FastCOCOEvaluator evaluates boxes, but the model predicts {what}: "
            "use COCOEvaluator in TEST.EVALUATORS"
        )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """{"bbox": {"AP": ..., "AP50": ..., "AP-class": ...}} in percent, as Detectron2 returns it.

        The result is empty on every process but the first. It is also empty if the dataset has no
        annotations or if no image was processed. All metrics are NaN if nothing was detected.

        Args:
            img_ids: ids of the images to evaluate; None for all.

        Raises:
            ConfigError: a detection's class or image is not in the dataset.
        """
        predictions = self.gather()
        if not predictions:
            return {}
        category_ids = self.category_ids(predictions)
        if self._output_dir:
            self._write(predictions, category_ids)
        if not self._do_evaluation:
            logger.info("%s has no annotations: AP is not computed", self._dataset_name)
            return {}
        summary = None
        if any(len(p.scores) for p in predictions):
            with _log_prints():
                summary = self._summarize(predictions, category_ids, img_ids)
        names = self._metadata.get("thing_classes")
        return OrderedDict(bbox=self._derive_coco_results(summary, "bbox", class_names=names))

    def gather(self) -> list[Detections]:
        """The detections of all processes; none on every process but the first."""
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return []
        if not predictions:
            logger.warning("%s: no image was evaluated", self._dataset_name)
        return predictions

    def category_ids(self, predictions: list[Detections]) -> list[int] | None:
        """The dataset's category id of each class; None if ids are the classes themselves.

        Raises:
            ConfigError: a detection's class is not in the dataset.
        """
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return None
        category_ids = sorted(mapping, key=mapping.__getitem__)
        highest = max((p.classes.max() for p in predictions if len(p.classes)), default=0)
        if highest >= len(category_ids):
            raise ConfigError(
                f"a detection has class {highest}, but {self._dataset_name} has "
                f"{len(category_ids)} classes: set MODEL.RETINANET.NUM_CLASSES {len(category_ids)}"
            )
        return category_ids

    def _write(self, predictions: list[Detections], category_ids: list[int] | None) -> None:
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        # image by image: with half a million dicts at once the garbage collector takes long
        images = (p.encode(category_ids) for p in predictions if len(p.scores))
        with PathManager.open(path, "w") as file:
            file.write(f"[{', '.join(images)}]")
        logger.debug("Detections written to %s", path)

    def _summarize(
        self,
        predictions: list[Detections],
        category_ids: list[int] | None,
        img_ids: Sequence[int] | None,
    ) -> COCOeval:
        """pycocotools' evaluation after ``summarize``, however it was computed."""
        unknown = {p.image_id for p in predictions if len(p.scores)} - self._coco_api.imgs.keys()
        if unknown:
            raise ConfigError(
                f"detections of image {min(unknown, key=str)}, which is not in the annotations of "
                f"{self._dataset_name}: images and annotation file do not belong together"
            )
        reason = self._fallback_reason(predictions)
        if reason is None:
            assert hotcoco is not None
            logger.debug("Evaluating with hotcoco %s", hotcoco.__version__)
            return self._run_hotcoco(as_rows(predictions, category_ids), img_ids)
        logger.debug("Evaluating with pycocotools: %s", reason)
        return _evaluate_predictions_on_coco(
            self._coco_api,
            list(itertools.chain(*(p.to_json(category_ids) for p in predictions))),
            "bbox",
            cocoeval_fn=COCOeval,
            img_ids=img_ids,
            max_dets_per_image=self._max_dets_per_image,
        )

    def _fallback_reason(self, predictions: list[Detections]) -> str | None:
        """Why hotcoco is not available, or would differ from pycocotools; None if it is used."""
        if hotcoco is None:
            return "`import hotcoco` fails, pip install 'retina_plugin[fast]' for 50x the speed"
        truth = self._coco_api
        ids = itertools.chain(truth.imgs, truth.cats)
        if not all(isinstance(i, int) and 0 <= i < 2**53 for i in ids):
            return "ids are not whole numbers below 2^53"  # as_rows makes float64 of them
        annotations = truth.dataset["annotations"]
        if len(annotations) != len(truth.anns):
            return "two annotations have the same id"
        if not all(a.keys() >= {"bbox", "area", "iscrowd"} for a in annotations):
            return "an annotation has no bbox, area or iscrowd"  # hotcoco would assume a value
        if not all(p.is_finite() for p in predictions):
            return "a detection is not finite"
        return None

    def _run_hotcoco(self, rows: np.ndarray, img_ids: Sequence[int] | None) -> COCOeval:
        assert hotcoco is not None
        # hotcoco does not take pycocotools' dataset object
        truth = hotcoco.COCO(_boxes_only(self._coco_api))
        fast = hotcoco.COCOeval(truth, truth.loadRes(rows), "bbox")
        fast.params.maxDets = max_dets = sorted(self._max_dets_per_image)  # pycocotools sorts too
        if img_ids is not None:
            fast.params.imgIds = sorted(set(img_ids))
        fast.evaluate()
        fast.accumulate()
        # as Detectron2 does: pycocotools can summarize for the limit 100 only
        kind = COCOeval if self._max_dets_per_image[2] == 100 else COCOevalMaxDets
        summary = kind(iouType="bbox")
        summary.params.maxDets = max_dets
        summary.eval = fast.eval
        summary.summarize()
        return summary


@contextlib.contextmanager
def _log_prints() -> Iterator[None]:
    """Log what pycocotools prints, at debug level."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    if printed.getvalue():
        logger.debug("pycocotools:\n%s", printed.getvalue().rstrip())


def _boxes_only(truth: COCO) -> dict[str, Any]:
    """The fields that matching reads.

    hotcoco rejects some files that pycocotools accepts because of other fields: Detectron2 itself
    writes ``"licenses": null``.
    """
    fields = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": i} for i in truth.imgs],
        "annotations": [{field: a[field] for field in fields} for a in truth.anns.values()],
        "categories": [{"id": i, "name": str(i)} for i in truth.cats],
    }
