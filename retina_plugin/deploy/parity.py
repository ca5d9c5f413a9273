"""Whether an exported file computes what the model computes, before anybody uses it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from retina_plugin.modeling import FocalRetinaNet

from .images import resized_batch
from .metadata import Metadata

__all__ = ["TOLERANCES", "Parity", "compare", "parity_sizes", "table"]

# Largest differences of a file that is not quantized. Boxes in pixels; logits and deltas as a part
# of the largest one. The files of this package's own models stay a hundred times below them.
TOLERANCES = {"boxes": 0.02, "scores": 1e-4, "logits": 1e-4, "deltas": 1e-4}

# Of the detections. The NMS decides by a comparison, so a difference in the last digit may keep
# another box.
_MATCHED = 0.99

# Of a file: an array by name. Of the model's detections: a list of N arrays of different lengths.
Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class Parity:
    """How a file differs from the model on a batch of one size.

    Attributes:
        batch, height, width: of the images.
        detections: of the model in these images; 0 in the stages boxes and head.
        matched: of them, those that the file has too: the class is the same, each corner within a
            pixel. A detection does not count if its score is so close to the threshold, or to that
            of the last of ``max_detections``, that a rounding decides.
        differences: the largest ones: boxes in pixels (within the image), scores, or logits and
            deltas as a part of the largest one.
        model_ms, file_ms: median time of a batch.
        where: what the largest difference beyond its tolerance is; "": there is none.
    """

    batch: int
    height: int
    width: int
    detections: int
    matched: int
    differences: dict[str, float]
    model_ms: float
    file_ms: float
    where: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parity_sizes(min_size: int, max_size: int) -> list[tuple[int, int]]:
    """Three sizes (height, width) around the test size: wide, tall and smaller, square and larger.

    None of the last two is a multiple of a stride, so both need padding.
    """
    side = min_size or 600
    longest = max_size or 2 * side
    larger = max(1, min(side * 5 // 4 + 3, longest - 3))
    return [
        (side, min(side * 4 // 3, longest)),
        (side * 4 // 5 + 1, side * 3 // 5 + 1),
        (larger, larger),
    ]


def compare(
    run: Callable[[np.ndarray], Outputs],
    model: FocalRetinaNet,
    metadata: Metadata,
    images: Sequence[np.ndarray],
    *,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int] = (1, 3),
    seconds: float = 2.0,
) -> list[Parity]:
    """Run a file and the model on the same pixels.

    The reference is the detector itself, not the function that was exported.

    Args:
        run: the file: (N, 3, H, W) float32 -> its outputs by name.
        model: in evaluation mode, on the CPU.
        metadata: of the file.
        images: (H, W, 3) uint8 in the model's format. Each is resized to each size.
        sizes, batches: every pair is compared.
        seconds: for which each pair is timed; each runs once at least.
    """
    found = []
    start = 0
    for height, width in sizes:
        for batch in batches:
            chosen = [images[(start + k) % len(images)] for k in range(batch)]
            start += batch  # other images in every comparison
            pixels = resized_batch(chosen, height, width)
            found.append(_compare_batch(run, model, metadata, pixels, seconds))
    return found


def table(results: Sequence[Parity]) -> str:
    """The results as text, a line for each batch."""
    names = list(results[0].differences)
    heading = ["size", "batch", "matched", *names, "model ms", "file ms", "ratio"]
    rows = []
    for x in results:
        matched = f"{x.matched}/{x.detections}" if x.detections else "-"
        differences = [f"{x.differences[name]:.1e}" for name in names]
        times = [f"{x.model_ms:.1f}", f"{x.file_ms:.1f}", f"{x.model_ms / x.file_ms:.2f}x"]
        rows.append([f"{x.height}x{x.width}", str(x.batch), matched, *differences, *times])
    return tabulate(rows, heading, tablefmt="plain", stralign="right", disable_numparse=True)


def _compare_batch(
    run: Callable[[np.ndarray], Outputs],
    model: FocalRetinaNet,
    metadata: Metadata,
    pixels: np.ndarray,
    seconds: float,
) -> Parity:
    reference = {"nms": _detect, "boxes": _decode, "head": _predict}[metadata.stage]
    images = torch.from_numpy(pixels)
    expected, given = reference(model, images), run(pixels)
    height, width = pixels.shape[2:]
    if metadata.stage == "nms":
        detections, matched, differences, where = _compare_detections(expected, given, metadata)
    else:
        detections = matched = 0
        differences, where = _compare_tensors(expected, given, height, width)
    model_ms, file_ms = _time([lambda: reference(model, images), lambda: run(pixels)], seconds)
    return Parity(
        len(pixels), height, width, detections, matched, differences, model_ms, file_ms, where
    )


@torch.inference_mode()
def _detect(model: FocalRetinaNet, images: Tensor) -> Outputs:
    """The final detections of each image."""
    found = [x["instances"] for x in model([{"image": image} for image in images])]
    return {
        "boxes": [x.pred_boxes.tensor.numpy() for x in found],
        "scores": [x.scores.numpy() for x in found],
        "classes": [x.pred_classes.numpy() for x in found],
    }


@torch.inference_mode()
def _predict(model: FocalRetinaNet, images: Tensor) -> Outputs:
    _, logits, deltas = _head(model, images)
    found = {}
    for what, levels in (("logits", logits), ("deltas", deltas)):
        for name, level in zip(model.head_in_features, levels):
            found[f"{what}_{name}"] = level.numpy()
    return found


@torch.inference_mode()
def _decode(model: FocalRetinaNet, images: Tensor) -> Outputs:
    """Boxes (N, R, 4) and scores (N, R, K), by the detector's own anchors and box transform."""
    anchors, logits, deltas = _head(model, images)
    boxes, scores = [], []
    for n in range(len(images)):
        flat = []
        for predictions, columns in ((logits, model.num_classes), (deltas, 4)):
            # (A*C, H, W) -> (H*W*A, C)
            rows = [x[n].unflatten(0, (-1, columns)).permute(2, 3, 0, 1) for x in predictions]
            flat.append(torch.cat([x.reshape(-1, columns) for x in rows]))
        boxes.append(model.box2box_transform.apply_deltas(flat[1], anchors))
        scores.append(flat[0].sigmoid())
    return {"boxes": torch.stack(boxes).numpy(), "scores": torch.stack(scores).numpy()}


def _head(model: FocalRetinaNet, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    batch = model.preprocess_image([{"image": image} for image in images])
    features = model.backbone(batch.tensor)
    features = [features[name] for name in model.head_in_features]
    anchors = torch.cat([x.tensor for x in model.anchor_generator(features)])
    return anchors, *model.head(features)


def _compare_tensors(
    expected: Outputs, given: Outputs, height: int, width: int
) -> tuple[dict[str, float], str]:
    largest: dict[str, float] = {}
    where = ""
    for name, reference in expected.items():
        output = given[name]
        what = name.partition("_")[0]
        if output.shape != reference.shape:
            return largest, f"{name} has the shape {output.shape}, the model's {reference.shape}"
        if what == "boxes":
            limit = np.array([width, height] * 2)
            reference, output = reference.clip(0, limit), output.clip(0, limit)
        difference = np.abs(reference.astype(np.float64) - output)
        if what in ("logits", "deltas"):
            difference /= max(1.0, np.abs(reference).max())
        difference = np.where(np.isnan(difference), np.inf, difference)
        worst = float(difference.max(initial=0.0))
        if worst > TOLERANCES[what] and worst > largest.get(what, -1.0):
            index = [int(i) for i in np.unravel_index(difference.argmax(), difference.shape)]
            where = f"{name} at {index} differs by {worst:.2g} (allowed: {TOLERANCES[what]:g})"
        largest[what] = max(worst, largest.get(what, 0.0))
    return largest, where


def _compare_detections(
    expected: Outputs, given: Outputs, metadata: Metadata
) -> tuple[int, int, dict[str, float], str]:
    largest = {"boxes": 0.0, "scores": 0.0}
    where = lost = ""
    matched = total = 0
    for n, (boxes, scores, classes) in enumerate(
        zip(expected["boxes"], expected["scores"], expected["classes"])
    ):
        present = given["classes"][n] >= 0
        other = {name: array[n][present] for name, array in given.items()}
        missing, extra, pairs = _match(boxes, classes, other["boxes"], other["classes"])
        full = max(len(scores), present.sum()) >= metadata.max_detections
        borders = [metadata.score_thresh, *([scores.min()] if full and len(scores) else [])]
        for i in missing:
            if not _is_near(scores[i], borders):
                total += 1
                lost = lost or f"image {n}: the file lacks {_name(i, scores, classes, metadata)}"
        for j in extra:
            if not _is_near(other["scores"][j], borders):
                total += 1
                name = _name(j, other["scores"], other["classes"], metadata)
                lost = lost or f"image {n}: only the file has {name}"
        for i, j in pairs:
            total, matched = total + 1, matched + 1
            apart = {
                "boxes": float(np.abs(boxes[i] - other["boxes"][j]).max()),
                "scores": float(abs(scores[i] - other["scores"][j])),
            }
            for what, by in apart.items():
                if by > max(TOLERANCES[what], largest[what]):
                    name = _name(i, scores, classes, metadata)
                    allowed = f"(allowed: {TOLERANCES[what]:g})"
                    where = f"image {n}: {what} of {name} differ by {by:.2g} {allowed}"
                largest[what] = max(largest[what], by)
    if matched < _MATCHED * total:
        where = lost
    return total, matched, largest, where


def _match(
    boxes: np.ndarray, classes: np.ndarray, other_boxes: np.ndarray, other_classes: np.ndarray
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Pairs of one class that are less than a pixel apart, and the rest on both sides."""
    free = np.ones(len(other_boxes), bool)
    pairs, missing = [], []
    for i in range(len(boxes)):
        apart = np.abs(other_boxes - boxes[i]).max(axis=1, initial=0.0)
        apart[~free | (other_classes != classes[i])] = np.inf
        if len(apart) and apart.min() < 1:
            j = int(apart.argmin())
            free[j] = False
            pairs.append((i, j))
        else:
            missing.append(i)
    return missing, [int(j) for j in np.flatnonzero(free)], pairs


def _is_near(score: float, borders: Sequence[float]) -> bool:
    return any(abs(score - border) <= TOLERANCES["scores"] for border in borders)


def _name(i: int, scores: np.ndarray, classes: np.ndarray, metadata: Metadata) -> str:
    return f"detection {i} ({metadata.class_names[int(classes[i])]}, score {scores[i]:.4f})"


def _time(runs: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Medians in milliseconds, measured in turn so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while not times[0] or (time.perf_counter() - begin < seconds and len(times[0]) < 20):
        for run, taken in zip(runs, times):
            start = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]
