"""The positive anchors that training would see, by the model's own matcher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import IGNORED
from retina_plugin.modeling import AnchorMatcher, FocalRetinaNet

from .anchors import AnchorGrid
from .ground_truth import GroundTruth, training_sizes

__all__ = ["MatchedSample", "has_anchors", "iou_limits", "low_quality_matches", "match_sample"]

_SAMPLE_IMAGES = 200


@dataclass(frozen=True)
class MatchedSample:
    """What the model's own matcher gives on some images. Counts are of all sampled images.

    Args:
        images: their number.
        anchors: all anchors.
        ignored: anchors that the loss leaves out.
        positives: level ("p3") -> its positive anchors.
        boxes: ground-truth boxes.
        boxes_without: boxes to which no positive anchor is assigned.
        anchors_N, ignored_N: the same by image.
        positives_NK: positives by image and class.
    """

    images: int
    anchors: int
    ignored: int
    positives: dict[str, int]
    boxes: int
    boxes_without: int
    anchors_N: tuple[int, ...]
    ignored_N: tuple[int, ...]
    positives_NK: tuple[tuple[int, ...], ...]


def has_anchors(cfg: CfgNode) -> bool:
    """Whether the config's detector is a RetinaNet, ours or Detectron2's."""
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return False
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(detector, type) and issubclass(detector, (FocalRetinaNet, RetinaNet))


def iou_limits(cfg: CfgNode) -> tuple[float, float]:
    """IoUs of an anchor from which it is no background, and from which it is positive.

    Raises:
        ConfigError: no label of ``IOU_LABELS`` is positive, or the matcher refuses the two keys.
    """
    thresholds, labels = cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS
    AnchorMatcher(thresholds, labels)
    if 1 not in labels:
        raise ConfigError(
            f"MODEL.RETINANET.IOU_LABELS {labels} has no 1 (positive): no IoU makes an anchor "
            "positive"
        )
    lower = next(t for t, label in zip(thresholds, labels[1:]) if label != 0)
    upper = next(t for t, label in zip(thresholds, labels[1:]) if label == 1)
    return lower, upper


def low_quality_matches(cfg: CfgNode) -> str:
    """``LOW_QUALITY_MATCHES``, which Detectron2's own RetinaNet does not read."""
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return "always" if issubclass(detector, RetinaNet) else cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES


def match_sample(
    cfg: CfgNode, grid: AnchorGrid, gt: GroundTruth, num_classes: int
) -> MatchedSample:
    """Match some images, evenly spread over the training set, as the model does it.

    The images take the training sizes in turn.
    """
    matcher = AnchorMatcher(
        cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS, low_quality_matches(cfg)
    )
    order = np.argsort(gt.image_G, kind="stable")
    ends = np.searchsorted(gt.image_G[order], range(len(gt.files) + 1))
    images = np.arange(len(gt.files))
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        images = np.unique(gt.image_G)
    chosen = np.linspace(0, len(images) - 1, min(len(images), _SAMPLE_IMAGES)).round().astype(int)
    frames = [gt.resized(size, cfg.INPUT.MAX_SIZE_TRAIN) for size in training_sizes(cfg)]
    positives_NL, positives_NK, anchors_N, ignored_N = [], [], [], []
    boxes = boxes_without = 0
    for n, image in enumerate(images[chosen]):
        boxes_G4, shapes_I2 = frames[n % len(frames)]
        own = order[ends[image] : ends[image + 1]]
        levels = grid.anchors(grid.map_shapes(shapes_I2[image : image + 1])[0])
        matches = matcher(torch.from_numpy(boxes_G4[own]).float(), torch.cat(levels))
        parts = matches.label.split([len(anchors) for anchors in levels])
        positives_NL.append([int((part == 0).sum()) for part in parts])
        anchors_N.append(len(matches.label))
        ignored_N.append(int((matches.label == IGNORED).sum()))
        assigned = matches.gt[matches.label == 0].numpy()
        boxes += len(own)
        boxes_without += len(own) - len(np.unique(assigned))
        classes = gt.classes_G[own][assigned]
        classes = classes[(classes >= 0) & (classes < num_classes)]
        positives_NK.append(tuple(np.bincount(classes, minlength=num_classes).tolist()))
    positives_L = np.sum(positives_NL, axis=0)
    return MatchedSample(
        images=len(anchors_N),
        anchors=sum(anchors_N),
        ignored=sum(ignored_N),
        positives={name: int(count) for name, count in zip(grid.names, positives_L)},
        boxes=boxes,
        boxes_without=boxes_without,
        anchors_N=tuple(anchors_N),
        ignored_N=tuple(ignored_N),
        positives_NK=tuple(positives_NK),
    )
