"""The two pictures that a training leaves behind."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.evaluation import inference_context
from detectron2.utils.visualizer import Visualizer
from torch import nn

from retina_plugin.data import DATASET_MAPPER_REGISTRY

from .precision import Autocast, inference_dtype

matplotlib.use("Agg")  # no display is needed; Detectron2 has the same dependency
import matplotlib.pyplot as plt

__all__ = ["draw_detections", "draw_training_curves"]

logger = logging.getLogger("retina_plugin")

_GT_COLOUR, _DETECTION_COLOUR = "lime", "orange"


def read_metrics(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Detectron2's ``metrics.json``, a JSON object a line -> name: [(iteration, value), ...].

    Detectron2 appends. Where the iterations step back, a training was resumed or begun anew in the
    same folder: what stood there from that iteration on is not part of it.
    """
    records: list[dict[str, float]] = []
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn: the process was killed while it wrote, and another one went on
        while records and records[-1]["iteration"] > record["iteration"]:
            records.pop()
        records.append(record)
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, value in record.items():
            if name != "iteration":
                series[name][int(record["iteration"])] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def draw_training_curves(metrics: str | os.PathLike, path: str | os.PathLike) -> None:
    """Losses, AP, positives by level and learning rate against the iteration, as one picture.

    Args:
        metrics: Detectron2's ``metrics.json``.
        path: the PNG to write.
    """
    series = read_metrics(metrics)
    levels = sorted(name for name in series if name.startswith("retinanet/num_pos_"))
    panels: list[tuple[str, list[str], str]] = [
        ("losses", ["total_loss", "loss_cls", "loss_box_reg"], "log"),
        (
            "classification loss",
            ["retinanet/cls_foreground", "retinanet/cls_background"],
            "log",
        ),
        (
            "AP on the test set",
            sorted(n for n in series if re.search(r"bbox/AP(50|75)?$", n)),
            "linear",
        ),
        ("positive anchors an image", levels, "linear"),
        ("learning rate", ["lr"], "linear"),
    ]
    panels = [p for p in panels if any(name in series for name in p[1])]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (title, names, scale) in zip(axes[0], panels):
        for name in names:
            if name in series:
                x, y = zip(*series[name])
                # of several test sets, the set's name tells them apart
                label = name.removeprefix("bbox/").removeprefix("retinanet/")
                axis.plot(x, y, marker="." if len(x) < 30 else "", label=label)
        axis.set(title=title, xlabel="iteration", yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    logger.info("Training curves: %s", path)


@torch.no_grad()
def draw_detections(
    cfg: Any,
    model: nn.Module,
    path: str | os.PathLike,
    num_images: int = 12,
    score_thresh: float = 0.3,
) -> None:
    """A sheet of validation images with ground truth and detections.

    Args:
        cfg: ``DATASETS.TEST[0]`` gives the images, spread over the whole set.
        model: the detector; it is left in the mode it was in.
        path: the PNG to write.
        num_images: at most so many.
        score_thresh: only detections with a higher score are drawn.
    """
    if not cfg.DATASETS.TEST:
        return
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    dataset = DatasetCatalog.get(name)
    chosen = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).round().astype(int)
    mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    # wrapped in DistributedDataParallel, only this process runs the model: use the inner one
    detector = Autocast(
        getattr(model, "module", model), torch.device(cfg.MODEL.DEVICE).type, inference_dtype(cfg)
    )
    for axis, index in zip(axes.flat, chosen):
        record = dataset[index]
        with inference_context(detector):
            instances = detector([mapper(record)])[0]["instances"].to("cpu")
        axis.imshow(
            _draw(
                utils.read_image(record["file_name"], "RGB"),
                record,
                instances[instances.scores > score_thresh],
                metadata,
            )
        )
        axis.set_title(Path(record["file_name"]).name, fontsize=8)
    figure.suptitle(
        f"{name}: ground truth ({_GT_COLOUR}), detections with score > {score_thresh} "
        f"({_DETECTION_COLOUR})"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    logger.info("Detections against ground truth: %s", path)


def _draw(image: np.ndarray, record: dict[str, Any], detections: Any, metadata: Any) -> np.ndarray:
    names = metadata.get("thing_classes")
    truth = utils.annotations_to_instances(
        [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)], image.shape[:2]
    )
    # small images are enlarged: the labels have a fixed size
    visualizer = Visualizer(image, metadata, scale=max(1.0, 480 / max(image.shape[:2])))
    if len(truth):
        visualizer.overlay_instances(
            boxes=truth.gt_boxes, assigned_colors=[_GT_COLOUR] * len(truth), alpha=0.9
        )
    labels = [
        f"{names[c] if names else c} {s:.2f}"
        for c, s in zip(detections.pred_classes.tolist(), detections.scores.tolist())
    ]
    drawn = visualizer.overlay_instances(
        boxes=detections.pred_boxes,
        labels=labels,
        assigned_colors=[_DETECTION_COLOUR] * len(labels),
        alpha=0.9,
    )
    return drawn.get_image()
