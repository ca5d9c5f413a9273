"""The AP of an exported file beside that of the model that it was made of."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from retina_plugin.cache import atomic_write
from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.doctor import raise_errors
from retina_plugin.doctor.datasets import check_datasets, dataset_records
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import FastCOCOEvaluator
from retina_plugin.modeling import FocalRetinaNet

from .loading import load_for_export
from .metadata import Metadata
from .runtime import ExportedModel, load_exported

__all__ = ["ApComparison", "check_file", "check_origin", "compare_ap"]


@dataclass(frozen=True)
class ApComparison:
    """A file and the model on one dataset.

    Attributes:
        dataset, images: the dataset's name, and how many of its images were used.
        model, file: {"AP": ..., "AP50": ...} in percent, by :class:`.FastCOCOEvaluator`. NaN: the
            dataset has no such object, or nothing was detected.
        model_ms, file_ms: median time of an image, from the resized pixels to detections.
    """

    dataset: str
    images: int
    model: dict[str, float]
    file: dict[str, float]
    model_ms: float
    file_ms: float

    @property
    def difference(self) -> dict[str, float]:
        """The file's metrics minus the model's."""
        return {name: self.file[name] - value for name, value in self.model.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None stands for it."""
        content = {**asdict(self), "difference": self.difference}
        for name in ("model", "file", "difference"):
            content[name] = {k: None if math.isnan(v) else v for k, v in content[name].items()}
        return content

    def table(self) -> str:
        """Three lines of metrics: the model's, the file's, the difference."""
        rows = []
        for name, values, taken in (
            ("model", self.model, self.model_ms),
            ("file", self.file, self.file_ms),
        ):
            rows.append([name, *(_number(x, ".2f") for x in values.values()), f"{taken:.1f}"])
        ratio = f"{self.model_ms / self.file_ms:.2f}x"
        rows.append(["difference", *(_number(x, "+.2f") for x in self.difference.values()), ratio])
        headers = ["", *self.model, "ms"]
        return tabulate(rows, headers, tablefmt="plain", stralign="right", disable_numparse=True)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def check_file(
    file: str | os.PathLike,
    config: str | os.PathLike | CfgNode,
    weights: str | os.PathLike = "",
    *,
    dataset: str | None = None,
    images: int | None = None,
    opts: Sequence[str] = (),
    output: str | os.PathLike | None = None,
) -> ApComparison:
    """Evaluate an exported file and the model of a config, side by side.

        found = check_file("model.onnx", "retina_R50_800.yaml", "model_final.pth")
        print(found.table())

    Args:
        file: of the stage nms, see :func:`.load_exported`.
        config, weights, opts: see :meth:`.RetinaPredictor.load`.
        dataset: a registered dataset; None: the first of ``DATASETS.TEST``.
        images: only so many of its images, the first ones; None: all.
        output: a JSON file for the result; None: none is written.

    Raises:
        ConfigError: the file was made of another config or other weights, or is of another stage;
            the dataset is unknown or not on this machine.
    """
    # Before the model is built: these take no time.
    exported = load_exported(file, threads=torch.get_num_threads())  # as many for both
    if exported.metadata.stage != "nms":
        raise ConfigError(
            f"{file} has the output stage {exported.metadata.stage}: AP is that of detections, so "
            "check a file of the stage nms"
        )
    cfg, model, metadata = load_for_export(config, weights, opts)
    check_origin(exported, metadata)
    if dataset is None and not cfg.DATASETS.TEST:
        raise ConfigError("there is no dataset: name one, or set DATASETS.TEST")
    name = dataset if dataset is not None else cfg.DATASETS.TEST[0]
    found = compare_ap(cfg, model, exported, name, images=images)
    if output is not None:
        try:
            with atomic_write(Path(output)) as temporary:
                temporary.write_text(json.dumps(found.to_dict(), indent=1))
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror or error}") from None
    return found


def check_origin(exported: ExportedModel, metadata: Metadata) -> None:
    """Check that a file was made of a config and weights. It may be quantized.

    Args:
        metadata: what a file of the config and weights would say of itself.

    Raises:
        ConfigError: it was made of others; the line says what differs.
    """
    path, made = exported.path, exported.metadata
    if made.class_names != metadata.class_names:
        raise ConfigError(
            f"{path} detects {_classes(made)}, the config's model {_classes(metadata)}: check it "
            "with the config and weights that it was made of"
        )
    if made.config_digest != metadata.config_digest:
        derived = {"config_digest", "weights_digest", "quantized", "made_by", "version"}
        derived |= {"class_names", "category_ids", "stage"}
        names = [field.name for field in fields(Metadata) if field.name not in derived]
        differing = [
            f"{name} {getattr(made, name)} is {getattr(metadata, name)} in the config"
            for name in names
            if getattr(made, name) != getattr(metadata, name)
        ]
        what = ", ".join(differing) or "another key of MODEL, INPUT or TEST differs"
        raise ConfigError(
            f"{path} was made of another config ({what}): check it with its own, or export again"
        )
    if made.weights_digest != metadata.weights_digest:
        raise ConfigError(f"{path} was made of other weights: check it with those, or export again")


def _classes(metadata: Metadata) -> str:
    names = metadata.class_names
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} classes ({', '.join(names[:3])}{more})"


@torch.inference_mode()
def compare_ap(
    cfg: CfgNode,
    model: FocalRetinaNet,
    exported: ExportedModel,
    dataset: str,
    *,
    images: int | None = None,
) -> ApComparison:
    """Evaluate a file and the model on the same resized images, one at a time.

    Images and resizing are those of an evaluation, by ``INPUT.MAPPER``. Metrics are COCO's,
    whatever ``TEST.EVALUATORS`` says: an evaluator of the user's need not give an AP, nor one of
    some images.

    Args:
        cfg, model: see :func:`.load_for_export`.
        exported: a file of the stage nms.
        dataset: a registered dataset with annotations.
        images: only so many images, the first ones; None: all.

    Raises:
        ConfigError: the dataset is unknown, not on this machine or without annotations, or it has
            other classes; ``images`` is below 1.
    """
    if images is not None and images < 1:
        raise ConfigError(f"images {images}: give 1 or more")
    records = _records(cfg, dataset)[:images]
    class_of = _classes_in(dataset, exported.metadata.class_names)
    mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
    runs: dict[str, Callable[[dict[str, Any]], Instances]] = {
        "model": lambda record: model([record])[0]["instances"],
        "file": lambda record: _detect(exported, model, record),
    }
    metrics: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        evaluators = {name: FastCOCOEvaluator(dataset, os.path.join(folder, name)) for name in runs}
        for evaluator in evaluators.values():
            evaluator.reset()
        ids = []
        for record in tqdm(records, desc=dataset, unit="image", disable=None):
            mapped = mapper(record)
            if mapped is None:  # an image that cannot be used, of which the mapper has warned
                continue
            ids.append(record["image_id"])
            for name, detect in runs.items():  # in turn, so that both meet the same machine
                start = time.perf_counter()
                instances = detect(mapped)
                times[name].append(1000 * (time.perf_counter() - start))
                instances.pred_classes = class_of[instances.pred_classes]
                evaluators[name].process([mapped], [{"instances": instances}])
        if not ids:
            raise ConfigError(f"no image of {dataset} can be used: the lines above say why")
        for name, evaluator in evaluators.items():
            part = {} if images is None else {"img_ids": ids}
            metrics[name] = _overall(evaluator.evaluate(**part), dataset)
    milliseconds = {name: statistics.median(taken) for name, taken in times.items()}
    return ApComparison(
        dataset,
        len(ids),
        metrics["model"],
        metrics["file"],
        milliseconds["model"],
        milliseconds["file"],
    )


def _records(cfg: CfgNode, dataset: str) -> list[dict[str, Any]]:
    """
    Raises:
        ConfigError: see :func:`compare_ap`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (dataset,)
    raise_errors(check_datasets(cfg, ("TEST",)))
    return dataset_records(dataset)


def _classes_in(dataset: str, names: Sequence[str]) -> Tensor:
    """(K,) place of each of the model's classes among the dataset's.

    Raises:
        ConfigError: the dataset has other ones.
    """
    numbers = [str(k) for k in range(len(names))]  # what stands for names that nobody knows
    theirs = list(MetadataCatalog.get(dataset).get("thing_classes") or numbers)
    if list(names) == numbers or theirs == numbers:
        return torch.arange(len(names))
    if sorted(theirs) != sorted(names):
        other = sorted(set(theirs) ^ set(names))[0]
        raise ConfigError(
            f"{dataset} has other classes than the model, such as {other}: name a dataset of its "
            "classes"
        )
    return torch.tensor([theirs.index(name) for name in names])


def _detect(exported: ExportedModel, model: FocalRetinaNet, record: dict[str, Any]) -> Instances:
    """The file's detections, in the size of the original image as the model's are."""
    image: Tensor = record["image"]
    pixels = image.numpy()[None].astype(np.float32)
    found = {name: array[0] for name, array in exported(pixels).items()}
    present = found["classes"] >= 0
    height, width = image.shape[-2:]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.from_numpy(found["boxes"][present]))
    instances.scores = torch.from_numpy(found["scores"][present])
    instances.pred_classes = torch.from_numpy(found["classes"][present])
    return model.postprocess(instances, record.get("height", height), record.get("width", width))


def _overall(results: Any, dataset: str) -> dict[str, float]:
    """The metrics of all classes together.

    Raises:
        ConfigError: the dataset has no annotations.
    """
    if not results:
        raise ConfigError(f"{dataset} has no annotations, so there is no AP: name another dataset")
    metrics = next(iter(results.values()))  # {"bbox": {...}}
    return {name: float(x) for name, x in metrics.items() if not name.startswith("AP-")}
