"""Single mistakes: what is wrong with each, and which of them to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from pycocotools import mask

from .ground_truth import GroundTruth
from .matching import IOU
from .predictions import Found
from .result import Case, Shown

__all__ = ["FIRST", "MOST", "find_cases", "group_by_image"]

FIRST = 12  # of each kind, whatever their classes
MOST = 60  # of each kind, with the first of each class
_NEAR = 0.1  # below this IoU a detection is on the background, as in TIDE

Boxes = np.ndarray


def find_cases(
    truth: GroundTruth,
    shown: Shown,
    every: Found,
    thresholds: np.ndarray,
    suspects: Iterable[dict[str, Any]],
) -> dict[str, list[Case]]:
    """The worst mistakes of each kind: most confident detections and largest missed objects first.

    Args:
        shown: the detections from the thresholds on.
        every: all detections.
        thresholds: (K,) of scores.
        suspects: hotcoco's label errors; their ``dt_id`` and ``gt_id`` count from 1.
    """
    found, right, missed = shown.found, shown.right, shown.missed
    cases: dict[str, list[Case]] = {k: [] for k in ("suspect", "swap", "false_positive", "miss")}
    suspected = {}
    for error in suspects:
        suspected[error["dt_id"] - 1] = error["gt_id"]
        cases["suspect"].append(_suspect(truth, found, error))
    explained = missed.copy()  # a swap says why its object is missed
    objects, detections = (group_by_image(x.images, len(truth.image_ids)) for x in (truth, found))
    for image in np.unique(found.images[~right]).tolist():
        around = objects(image)
        around = around[~truth.crowds[around]]
        wrong = detections(image)
        wrong = wrong[~right[wrong]]
        overlaps = _iou(found.boxes[wrong], truth.boxes[around])
        for i, overlap in zip(wrong.tolist(), overlaps):
            case, taken = _wrong_detection(truth, found, i, around, overlap, missed)
            if taken is not None:
                explained[taken] = False
            if i not in suspected:
                cases[case.kind].append(case)
    order = np.flatnonzero(explained)
    order = order[np.argsort(-truth.areas[order], kind="stable")]
    cases["miss"] = [
        Case("miss", int(truth.images[g]), "", true=int(truth.classes[g]), true_box=_box(truth, g))
        for g in order.tolist()
    ]
    for kind in ("suspect", "swap", "false_positive"):
        cases[kind].sort(key=lambda case: -(case.score or 0))
    picked = {kind: list(_pick(found_cases)) for kind, found_cases in cases.items()}
    of_image = group_by_image(every.images, len(truth.image_ids))
    picked["miss"] = [_explain_miss(c, truth, every, of_image, thresholds) for c in picked["miss"]]
    return picked


def group_by_image(images: np.ndarray, number: int) -> Callable[[int], np.ndarray]:
    """A function from an image to the places of its entries, in order."""
    order = np.argsort(images, kind="stable")
    ends = np.searchsorted(images[order], np.arange(number + 1))
    return lambda image: order[ends[image] : ends[image + 1]]


def _pick(cases: list[Case]) -> Iterator[Case]:
    """The first of all, then the first of each class in turn."""
    yield from cases[:FIRST]
    rest: dict[int | None, list[Case]] = {}
    for case in cases[FIRST:]:
        rest.setdefault(case.true if case.found is None else case.found, []).append(case)
    number = min(len(cases), FIRST)
    for rank in range(FIRST):
        for of_class in rest.values():
            if rank < len(of_class) and number < MOST:
                number += 1
                yield Case(**{**vars(of_class[rank]), "first": False})


def _suspect(truth: GroundTruth, found: Found, error: dict[str, Any]) -> Case:
    i = error["dt_id"] - 1
    says = truth.class_names[found.classes[i]]
    score = found.scores[i]
    if error["gt_id"] is None:
        text = f"nothing is labelled where the model sees “{says}” with score {score:.2f}"
        return _case("suspect", found, i, text)
    g = error["gt_id"] - 1
    label = truth.class_names[truth.classes[g]]
    text = f"labelled “{label}”, but the model says “{says}” with score {score:.2f}"
    return _case("suspect", found, i, text, truth, g, error["iou"])


def _wrong_detection(
    truth: GroundTruth,
    found: Found,
    i: int,
    around: np.ndarray,
    overlap: np.ndarray,
    missed: np.ndarray,
) -> tuple[Case, int | None]:
    """The case of a wrong detection, and the missed object whose place it takes, if any.

    Args:
        around: the objects of the image.
        overlap: the detection's IoU with each.
    """
    name = truth.class_names[found.classes[i]]
    same = truth.classes[around] == found.classes[i]
    own, other = (np.where(x, overlap, 0.0) for x in (same, ~same))
    best_own, best_other = own.max(initial=0.0), other.max(initial=0.0)
    if best_other >= IOU and best_other > best_own:
        # of two objects in one place, the missed one
        among = np.where(missed[around] & (other >= IOU), 1 + other, other)
        g = int(around[among.argmax()])
        label = truth.class_names[truth.classes[g]]
        text = f"“{label}” is taken for “{name}”"
        if not missed[g]:
            text += f"; it is found as “{label}” too"
        case = _case("swap", found, i, text, truth, g, float(other[among.argmax()]))
        return case, g if missed[g] else None
    if best_own >= IOU:
        text, g = f"a second box for a “{name}” that is found already", int(around[own.argmax()])
    elif best_own >= _NEAR:
        text, g = f"the box of this “{name}” is off", int(around[own.argmax()])
    elif best_other >= _NEAR:
        g = int(around[other.argmax()])
        text = f"“{name}” on a part of a “{truth.class_names[truth.classes[g]]}”"
    else:
        return _case("false_positive", found, i, f"“{name}” where nothing is labelled"), None
    iou = max(best_own, best_other if best_own < _NEAR else 0.0)
    return _case("false_positive", found, i, text, truth, g, float(iou)), None


def _explain_miss(
    case: Case,
    truth: GroundTruth,
    every: Found,
    of_image: Callable[[int], np.ndarray],
    thresholds: np.ndarray,
) -> Case:
    assert case.true is not None and case.true_box is not None
    name, threshold = truth.class_names[case.true], thresholds[case.true]
    near = of_image(case.image)
    near = near[every.classes[near] == case.true]
    overlap = _iou(np.array([case.true_box]), every.boxes[near])[0]
    text = f"“{name}” is missed"
    hits = near[overlap >= IOU]
    if len(hits) and every.scores[hits].max() < threshold:
        score = every.scores[hits].max()
        text += f": it has score {score:.2f}, below the threshold {threshold:.2f}"
    elif overlap.max(initial=0.0) >= _NEAR:
        text += f": the nearest box of its class has IoU {overlap.max():.2f}"
    else:
        text += ": there is no box of its class here"
    return Case(**{**vars(case), "text": text})


def _case(
    kind: str,
    found: Found,
    i: int,
    text: str,
    truth: GroundTruth | None = None,
    g: int | None = None,
    iou: float | None = None,
) -> Case:
    about = truth is not None and g is not None
    return Case(
        kind,
        int(found.images[i]),
        text,
        found=int(found.classes[i]),
        score=float(found.scores[i]),
        box=_box(found, i),
        true=int(truth.classes[g]) if about else None,  # type: ignore[union-attr]
        true_box=_box(truth, g) if about else None,  # type: ignore[arg-type]
        iou=iou,
    )


def _box(table: GroundTruth | Found, i: int) -> tuple[float, ...]:
    return tuple(table.boxes[i].tolist())


def _iou(first: Boxes, second: Boxes) -> np.ndarray:
    """(N, M) of XYWH boxes."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    return mask.iou(first, second, np.zeros(len(second), np.uint8))
