"""What came out of a training or an evaluation: two pictures and a table of metrics."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from tabulate import tabulate
from torch import nn

from retina_plugin.data import DATASET_MAPPER_REGISTRY

from .performance import Autocast, inference_dtype

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt

__all__ = [
    "draw_detections",
    "draw_training_curves",
    "log_results",
    "metrics_by_dataset",
    "read_metrics",
]

logger = logging.getLogger("retina_plugin")

_GT_COLOUR, _DETECTION_COLOUR = "lime", "orange"


def read_metrics(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Read Detectron2's ``metrics.json``, which has a JSON object a line.

    Detectron2 appends to the file. If the iterations step back, a training was resumed or started
    again in the same folder; older lines from that iteration on are dropped.

    Returns:
        Name of a metric -> [(iteration, value), ...].
    """
    records: list[dict[str, float]] = []
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the process was killed while it wrote this line
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
    """Draw losses, AP, positive anchors by level and learning rate against the iteration.

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
                # With several test sets, the name of the set stays.
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
    cfg: CfgNode,
    model: nn.Module,
    path: str | os.PathLike,
    num_images: int = 12,
    score_thresh: float = 0.3,
) -> None:
    """Draw images of the first test set with their ground truth and detections, as one picture.

    Without a test set, nothing is drawn.

    Args:
        cfg: the images are taken evenly from ``DATASETS.TEST[0]``.
        model: the detector; its training mode is restored.
        path: the PNG to write.
        num_images: images to draw at most.
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
    # Only this process draws, and DistributedDataParallel would wait for the others: unwrap it.
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


def _draw(
    image: np.ndarray, record: dict[str, Any], detections: Instances, metadata: Metadata
) -> np.ndarray:
    names = metadata.get("thing_classes")
    truth = utils.annotations_to_instances(
        [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)], image.shape[:2]
    )
    # Labels have a fixed size, so small images are enlarged.
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


def metrics_by_dataset(cfg: CfgNode, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Test set -> metric -> value, of what ``Trainer.test`` returns. Single classes are left out.

    Args:
        cfg: names the test sets.
        results: task -> metric -> value; with several test sets, such a mapping for each set.
    """
    names = cfg.DATASETS.TEST
    by_dataset = results if len(names) > 1 else dict.fromkeys(names, results)
    found: dict[str, dict[str, float]] = {}
    for name, tasks in by_dataset.items():
        found[name] = {}
        for task, metrics in tasks.items():
            prefix = f"{task} " if len(tasks) > 1 else ""
            if not isinstance(metrics, Mapping):  # a number, of an evaluator of the user
                prefix, metrics = "", {task: metrics}
            for metric, value in metrics.items():
                if "-" not in metric:  # Detectron2's "AP-car" is the AP of a class
                    found[name][prefix + metric] = value
    return found


def log_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Log the table of metrics of an evaluation: a row for each test set."""
    found = metrics_by_dataset(cfg, results)
    metrics = list(dict.fromkeys(metric for row in found.values() for metric in row))
    if metrics:
        rows = [[name, *(row.get(metric) for metric in metrics)] for name, row in found.items()]
        table = tabulate(rows, headers=["", *metrics], tablefmt="pipe", floatfmt=".3f")
        logger.info("Results (AP in percent):\n%s", table)
