"""Boxes that mean the same object become one: ``TEST.MERGE``, and ``TEST.AUG.MERGE`` for views.

Every merge takes and gives boxes (S, 4) XYXY in pixels, scores (S,) and classes (S,), and sorts
them by decreasing score; of equal scores the first stays first. Boxes have an area, or an IoU of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.layers import batched_nms
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice

__all__ = ["Detections", "Merge", "build_merge", "fuse_views", "soft_nms", "weighted_boxes_fusion"]

Detections = tuple[Tensor, Tensor, Tensor]  # boxes (S, 4), scores (S,), classes (S,)
Merge = Callable[[Tensor, Tensor, Tensor], Detections]


def build_merge(name: str, *, iou_thresh: float, num_views: int = 1) -> Merge:
    """The merge of a name.

    - ``nms``: of two boxes of a class with a greater IoU, the one with the lower score is dropped
      (section 4.1 "Inference"). It is Detectron2's ``batched_nms``.
    - ``soft_nms``: its score is lowered instead, see :func:`soft_nms`.
    - ``class_agnostic``: ``nms`` as if all boxes had one class.
    - ``wbf``: boxes of a class are averaged, see :func:`weighted_boxes_fusion`.

    Args:
        name: see above.
        iou_thresh: IoU above which boxes mean the same object; the Gaussian ``soft_nms`` has none.
        num_views: how many views of an image the boxes come from (``wbf``).

    Raises:
        ConfigError: an unknown name.

    Example::

        merge = build_merge("wbf", iou_thresh=0.5)
        boxes_S4, scores_S, classes_S = merge(boxes_R4, scores_R, classes_R)
    """
    check_choice("TEST.MERGE", name, KEYS["TEST.MERGE"].choices)

    def merge(boxes: Tensor, scores: Tensor, classes: Tensor) -> Detections:
        if name == "soft_nms":
            return soft_nms(boxes, scores, classes)
        if name == "wbf":
            return weighted_boxes_fusion(
                boxes, scores, classes, iou_thresh=iou_thresh, num_views=num_views
            )
        if name == "nms":
            keep = batched_nms(boxes, scores, classes, iou_thresh)
        else:
            keep = torchvision_nms(boxes.float(), scores.float(), iou_thresh)
        return boxes[keep], scores[keep], classes[keep]

    return merge


def fuse_views(views: Sequence[Detections], *, iou_thresh: float, name: str = "wbf") -> Detections:
    """Detections of several views of one image, in its frame, as those of the image.

    A single view is only sorted: there is nothing to merge it with.

    Args:
        views: at least one. A view without detections counts: with ``wbf`` it lowers the scores of
            what the others found.
        iou_thresh, name: see :func:`build_merge`.
    """
    boxes, scores, classes = (torch.cat(parts) for parts in zip(*views))
    if len(views) == 1:
        order = scores.argsort(descending=True, stable=True)
        return boxes[order], scores[order], classes[order]
    merge = build_merge(name, iou_thresh=iou_thresh, num_views=len(views))
    return merge(boxes, scores, classes)


@torch.no_grad()
def soft_nms(
    boxes_S4: Tensor,
    scores_S: Tensor,
    classes_S: Tensor,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_thresh: float = 0.3,
    min_score: float = 0.001,
) -> Detections:
    """Soft-NMS: boxes that overlap a better one of their class get a lower score.

    Bodla, Singh, Chellappa, Davis, "Soft-NMS: Improving Object Detection With One Line of Code"
    (arXiv:1704.04503). The box M with the highest score is taken out, the scores of the others
    become ``s * exp(-IoU(M, b)^2 / sigma)`` ("gaussian"), or ``s * (1 - IoU(M, b))`` where the IoU
    is above ``iou_thresh`` ("linear"); and so on with the rest.

    The Gaussian is the default, as in OpenCV's ``softNMSBoxes``: it has no step at a threshold. The
    authors' code offers both, with these numbers.

    Args:
        min_score: boxes whose score falls below it are dropped.

    Returns:
        Boxes, their new scores and classes, by decreasing score.
    """
    check_choice("method", method, ("gaussian", "linear"))
    boxes, scores = _numpy(boxes_S4), _numpy(scores_S)
    found: list[int] = []
    lowered: list[float] = []
    for index in _index_of_classes(scores_S, classes_S):
        left, left_boxes = scores[index], boxes[index]
        while len(index):
            best = int(left.argmax())  # of equal ones the first
            if left[best] < min_score:
                break
            found.append(index[best])
            lowered.append(left[best])
            iou = _iou(left_boxes[best], left_boxes)
            if method == "gaussian":
                left *= np.exp(-(iou**2) / sigma)
            else:
                left *= np.where(iou > iou_thresh, 1 - iou, 1)
            left[best] = 0  # taken
            keep = left >= min_score  # scores only fall
            index, left, left_boxes = index[keep], left[keep], left_boxes[keep]
    order = _decreasing(lowered, found)
    taken = torch.as_tensor(np.array(found, np.int64)[order], device=boxes_S4.device)
    new_scores = scores_S.new_tensor(np.array(lowered, np.float64)[order])
    return boxes_S4[taken], new_scores, classes_S[taken]


@torch.no_grad()
def weighted_boxes_fusion(
    boxes_S4: Tensor,
    scores_S: Tensor,
    classes_S: Tensor,
    *,
    iou_thresh: float = 0.55,
    num_views: int = 1,
) -> Detections:
    """Weighted boxes fusion: clusters of boxes of a class become their averages.

    Solovyev, Wang, Gabruseva, "Weighted boxes fusion: Ensembling boxes from different object
    detection models" (arXiv:1910.13302). By decreasing score, each box joins the cluster of its
    class whose fused box overlaps it most, if that IoU is above ``iou_thresh``, or opens a new one.
    With T boxes of a cluster and N views, its coordinates and its score are

        sum(score * coordinate) / sum(score)    and    mean(score) * min(T, N) / N

    so what few of the views found scores low. (The paper's other rescaling, by T / N, lets scores
    exceed 1.)

    Peer: ``ensemble_boxes.weighted_boxes_fusion``, whose boxes are in [0, 1].

    Args:
        iou_thresh: .55 is the paper's.
        num_views: N.

    Returns:
        Fused boxes, scores and classes, by decreasing score.
    """
    boxes, scores = _numpy(boxes_S4), _numpy(scores_S)
    opened_by: list[int] = []  # the box that each cluster began with
    fused: list[np.ndarray] = []
    fused_scores: list[float] = []
    for index in _index_of_classes(scores_S, classes_S):
        # of each cluster: sum(score * box), sum(score), T; and the fused box
        weighted, total, size = np.zeros((len(index), 4)), np.zeros(len(index)), [0] * len(index)
        mean = np.zeros((len(index), 4))
        num_clusters = 0
        for i in index:
            box, score = boxes[i], scores[i]
            cluster = num_clusters
            if num_clusters:
                iou = _iou(box, mean[:num_clusters])
                nearest = int(iou.argmax())
                cluster = nearest if iou[nearest] > iou_thresh else cluster
            weighted[cluster] += score * box
            total[cluster] += score
            size[cluster] += 1
            if cluster == num_clusters:
                num_clusters += 1
                opened_by.append(i)
                mean[cluster] = box
            elif total[cluster] > 0:  # scores of 0 have no weighted mean
                mean[cluster] = weighted[cluster] / total[cluster]
        fused += list(mean[:num_clusters])
        fused_scores += [
            total[c] / size[c] * (min(size[c], num_views) / num_views) for c in range(num_clusters)
        ]
    order = _decreasing(fused_scores, opened_by)
    first = torch.as_tensor(np.array(opened_by, np.int64)[order], device=boxes_S4.device)
    return (
        boxes_S4.new_tensor(np.array(fused).reshape(-1, 4)[order]),
        scores_S.new_tensor(np.array(fused_scores)[order]),
        classes_S[first],
    )


# Both algorithms go through the boxes one by one, with a dozen small operations for each: NumPy
# does these in a tenth of torch's time, and on a GPU in less than starting the kernels would take.


def _numpy(x: Tensor) -> np.ndarray:
    if torch.jit.is_tracing():  # the trace would hold these very numbers
        raise ConfigError(
            "soft_nms and wbf cannot be traced: trace with TEST.MERGE nms or class_agnostic"
        )
    return x.detach().cpu().double().numpy()  # float64: many products and sums


def _index_of_classes(scores: Tensor, classes: Tensor) -> Iterator[np.ndarray]:
    """Indices of the boxes of each class, by decreasing score; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True).cpu().numpy()
    sorted_classes = classes.cpu().numpy()[order]
    for class_ in np.unique(sorted_classes):
        yield order[sorted_classes == class_]


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with (S, 4) boxes; 0 of two without area."""
    width = np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0])
    height = np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1])
    intersection = width.clip(min=0) * height.clip(min=0)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + areas - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).tiny)


def _decreasing(scores: list[float], index: list[int]) -> np.ndarray:
    """Order of decreasing scores; of equal ones the lowest index comes first."""
    return np.lexsort((np.array(index, np.int64), -np.array(scores, np.float64)))
