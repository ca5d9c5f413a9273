"""What came out of a training or an evaluation: two pictures and a table of metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tabulate import tabulate
from torch import nn

from retina_plugin.data.views import build_test_mapper

from .performance import build_detector

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt

__all__ = [
    "choose_evenly",
    "draw_detections",
    "draw_images",
    "draw_training_curves",
    "log_results",
    "metrics_by_dataset",
    "read_metrics",
    "survive_drawing",
]

logger = logging.getLogger("retina_plugin")

_GT_COLOUR, _DETECTION_COLOUR = "lime", "orange"
_MAX_SIDE = 720  # pixels of an image that is drawn on
_MAX_BOXES = 200  # true boxes that are drawn of an image


def read_metrics(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Read Detectron2's ``metrics.json``, which has a JSON object a line.

    Detectron2 appends to the file. If the iterations of the training's own records, those with
    ``total_loss``, step back, a training was resumed or started again in the same folder; older
    lines from that iteration on are dropped. Other lines may step back: Detectron2 writes those of
    an evaluation after newer losses.

    Returns:
        Name of a metric -> [(iteration, value), ...].
    """
    records: list[dict[str, float]] = []
    last = -1  # iteration of the training's last record
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, TypeError, KeyError):
            continue  # the process was killed while it wrote this line
        if "total_loss" in record:
            if iteration < last:
                records = [r for r in records if r["iteration"] <= iteration]
            last = iteration
        records.append(record)
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, value in record.items():
            if name != "iteration":
                series[name][int(record["iteration"])] = value
    return {name: sorted(points.items()) for name, points in series.items()}


@contextlib.contextmanager
def survive_drawing(path: str | os.PathLike) -> Iterator[None]:
    """A picture that cannot be drawn is a warning: the training before it has succeeded."""
    others = set(plt.get_fignums())
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())
        logger.warning("%s is not drawn: %s: %s", path, type(error).__name__, what)
        logger.debug("%s", path, exc_info=True)
    finally:
        for number in set(plt.get_fignums()) - others:
            plt.close(number)


def draw_training_curves(metrics: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw losses, AP, positive anchors by level and learning rate against the iteration.

    Without any of these in the file, or if the picture cannot be written, a warning is logged.

    Args:
        metrics: Detectron2's ``metrics.json``.
        path: the PNG to write.
    """
    with survive_drawing(path):
        _draw_training_curves(metrics, path)


def _draw_training_curves(metrics: str | os.PathLike, path: str | os.PathLike) -> None:
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
    if not panels:
        logger.warning("%s is not drawn: %s has no losses", path, metrics)
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (title, names, scale) in zip(axes[0], panels):
        for name in names:
            if name in series:
                x, y = zip(*series[name])
                # With several test sets, the name of the set stays.
                label = name.removeprefix("bbox/").removeprefix("retinanet/")
                label = label.replace("$", r"\$")  # otherwise two of them enclose a formula
                axis.plot(x, y, marker="." if len(x) < 30 else "", label=label)
        axis.set(title=title, xlabel="iteration", yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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

    Without a test set, nothing is drawn. If the picture cannot be drawn, a warning is logged.

    Args:
        cfg: the images are taken evenly from ``DATASETS.TEST[0]``.
        model: the detector; its training mode is restored.
        path: the PNG to write.
        num_images: images to draw at most.
        score_thresh: only detections with a higher score are drawn.
    """
    # "$" in a file's or a class's name is a dollar, not the start of a formula.
    with survive_drawing(path), matplotlib.rc_context({"text.parse_math": False}):
        if cfg.DATASETS.TEST:
            _draw_detections(cfg, model, path, num_images, score_thresh)


def _draw_detections(
    cfg: CfgNode,
    model: nn.Module,
    path: str | os.PathLike,
    num_images: int,
    score_thresh: float,
) -> None:
    name = cfg.DATASETS.TEST[0]
    names = MetadataCatalog.get(name).get("thing_classes")
    dataset = DatasetCatalog.get(name)
    records = choose_evenly(dataset, num_images)
    rows, columns = -(-len(records) // 4), min(4, len(records))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    pictures = draw_images(cfg, model, records, names, score_thresh)
    for axis, record, picture in zip(axes.flat, records, pictures):
        title, total = Path(record["file_name"]).name, len(_truth(record))
        title += f" ({_MAX_BOXES} of {total} true boxes)" if total > _MAX_BOXES else ""
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    figure.suptitle(
        f"{name}: ground truth ({_GT_COLOUR}), detections with score > {score_thresh} "
        f"({_DETECTION_COLOUR})"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    logger.info("Detections against ground truth: %s", path)


def choose_evenly(dataset: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """At most ``number`` records, evenly over the dataset: always the same ones."""
    chosen = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).round().astype(int)
    return [dataset[index] for index in chosen]


@torch.no_grad()
def draw_images(
    cfg: CfgNode,
    model: nn.Module,
    records: Sequence[dict[str, Any]],
    names: Sequence[str] | None,
    score_thresh: float = 0.3,
) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB pictures of images with their ground truth and detections."""
    mapper = build_test_mapper(cfg)
    # Only this process draws, and DistributedDataParallel would wait for the others: unwrap it.
    detector = build_detector(cfg, getattr(model, "module", model))
    for record in records:
        with inference_context(detector):
            instances = detector([mapper(record)])[0]["instances"].to("cpu")
        found = instances[instances.scores > score_thresh]
        image = utils.read_image(record["file_name"], "RGB")
        yield _draw(image, _truth(record)[:_MAX_BOXES], found, names)


def _truth(record: dict[str, Any]) -> np.ndarray:
    """(N, 4) XYXY boxes of the objects that are no crowds."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in record.get("annotations", [])
        if not a.get("iscrowd", 0)
    ]
    return np.array(boxes, np.float64).reshape(-1, 4)


def _draw(
    image: np.ndarray, truth: np.ndarray, detections: Instances, names: Sequence[str] | None
) -> np.ndarray:
    # A picture of the sheet has 360 pixels. Larger images are shrunk first, because drawing takes
    # time and memory by the pixel; labels have a fixed size, so small images are enlarged.
    factor = _MAX_SIDE / max(image.shape[:2])
    if factor < 1:
        size = (max(1, round(n * factor)) for n in image.shape[1::-1])
        image = np.asarray(Image.fromarray(image).resize(tuple(size), Image.Resampling.BILINEAR))
    factor = min(factor, 1.0)
    visualizer = Visualizer(image, scale=max(1.0, 480 / max(image.shape[:2])))
    if len(truth):
        visualizer.overlay_instances(
            boxes=truth * factor, assigned_colors=[_GT_COLOUR] * len(truth), alpha=0.9
        )
    labels = [
        f"{names[c] if names else c} {s:.2f}"
        for c, s in zip(detections.pred_classes.tolist(), detections.scores.tolist())
    ]
    drawn = visualizer.overlay_instances(
        boxes=detections.pred_boxes.tensor.numpy() * factor,
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
