"""What a training learns from: positive anchors, classes, the first loss, the cost of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from detectron2.config import CfgNode

from retina_plugin.losses import CLS_LOSS_REGISTRY
from retina_plugin.modeling import LossNormalizer, prior_bias

from .findings import Finding, Severity
from .ground_truth import GroundTruth
from .matches import MatchedSample
from .recall import percent

__all__ = [
    "ClassCount",
    "FirstLoss",
    "StepCost",
    "class_counts",
    "class_findings",
    "first_loss",
    "loss_findings",
    "positive_findings",
    "step_findings",
]

_FEW_BOXES = 20  # of a class: too few to learn it
_RARE = 0.01  # of the mean over classes
_LARGE_PRIOR = 0.1  # PRIOR_PROB: the paper's .01 to .1 all train (section 5.1)
_EXAMPLES = 10  # classes that a finding names
_ALMOST_ALL = 0.9  # of the memory


@dataclass(frozen=True)
class ClassCount:
    """Boxes of a class, and images that have any."""

    name: str
    boxes: int
    images: int


def class_counts(gt: GroundTruth, class_names: Sequence[str]) -> tuple[ClassCount, ...]:
    """The class histogram of a training set, in the order of the classes."""
    K = len(class_names)
    inside = (gt.classes_G >= 0) & (gt.classes_G < K)
    classes, images = gt.classes_G[inside], gt.image_G[inside]
    boxes_K = np.bincount(classes, minlength=K)
    pairs = np.unique(classes + K * images)
    images_K = np.bincount(pairs % K, minlength=K) if K else boxes_K
    return tuple(
        ClassCount(name, int(boxes), int(images))
        for name, boxes, images in zip(class_names, boxes_K, images_K)
    )


def class_findings(counts: Sequence[ClassCount]) -> Iterator[Finding]:
    """Classes without boxes, and rare ones."""
    if not any(count.boxes for count in counts):
        return
    absent = [count.name for count in counts if not count.boxes]
    if absent:
        yield Finding(
            Severity.WARNING,
            "DATASETS.TRAIN",
            f"{len(absent)} of {len(counts)} classes have no box to train with: {_listed(absent)}",
            "add images of them, or take them out of the dataset's classes",
        )
    limit = max(_FEW_BOXES, _RARE * fmean(count.boxes for count in counts))
    rare = sorted((c for c in counts if 0 < c.boxes < limit), key=lambda count: count.boxes)
    if rare:
        most = max(counts, key=lambda count: count.boxes)
        yield Finding(
            Severity.NOTE,
            "DATASETS.TRAIN",
            f"{len(rare)} of {len(counts)} classes are rare: "
            + _listed([f"{c.name} ({c.boxes} boxes in {c.images} images)" for c in rare])
            + f"; the most frequent is {most.name} ({most.boxes:,} boxes)",
            "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler draws their images more often",
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _EXAMPLES} more" if names[_EXAMPLES:] else ""
    return ", ".join(names[:_EXAMPLES]) + more


def positive_findings(sample: MatchedSample) -> Iterator[Finding]:
    """The share of positive anchors, by level."""
    levels = ", ".join(
        f"{name} {count / sample.images:.3g}" for name, count in sample.positives.items()
    )
    positives = sum(sample.positives.values())
    yield Finding(
        Severity.NOTE,
        "MODEL.ANCHOR_GENERATOR",
        f"{positives / sample.images:.3g} of {sample.anchors / sample.images:,.0f} anchors of an "
        f"image are positive ({100 * positives / sample.anchors:.2g} %), "
        f"{100 * sample.ignored / sample.anchors:.2g} % are ignored; positive by level: {levels} "
        f"(mean of {sample.images} images)",
    )


@dataclass(frozen=True)
class FirstLoss:
    """``loss_cls`` of an untrained head; ``foreground`` and ``background`` are its parts."""

    prior: float
    loss: str
    normalizer: str
    foreground: float
    background: float

    @property
    def total(self) -> float:
        return self.foreground + self.background


def first_loss(cfg: CfgNode, sample: MatchedSample, processes: int = 1) -> FirstLoss | None:
    """The classification loss to expect in the first iteration, in closed form.

    An untrained head gives every class the probability pi = ``PRIOR_PROB``, so its logits are
    b = -log((1 - pi) / pi) but for a small spread (section 4.1, "Initialization"). With F positive
    and V not ignored anchors, and a loss l with the weights alpha_t, an image's sum is::

        S = F alpha l(b) + (K V - F) (1 - alpha) l(-b)

    Args:
        cfg: the config.
        sample: matched images.
        processes: among which a batch is divided, for ``NORMALIZER`` "per_gpu", "global" and "ema",
            which count the positives of a process's images.

    Returns:
        None for a sampler that takes some anchors only: which these are, the untrained logits
        decide.
    """
    retinanet = cfg.MODEL.RETINANET
    if retinanet.SAMPLER != "AllAnchors" or not sum(map(sum, sample.positives_NK)):
        return None
    loss = CLS_LOSS_REGISTRY.build(cfg)
    bias = prior_bias(retinanet.PRIOR_PROB)
    at_positive, at_negative = loss.value(torch.tensor([bias, -bias], dtype=torch.float64)).tolist()
    K = retinanet.NUM_CLASSES
    positive_K = np.broadcast_to(np.asarray(loss.positive_weight, dtype=np.float64), K)
    negative_K = np.broadcast_to(np.asarray(loss.negative_weight, dtype=np.float64), K)
    F_NK = np.zeros((sample.images, K))
    known_NK = np.array(sample.positives_NK)[:, :K]
    F_NK[:, : known_NK.shape[1]] = known_NK
    F_N = F_NK.sum(axis=1)
    V_N = np.array(sample.anchors_N) - np.array(sample.ignored_N)
    foreground_N = F_NK @ positive_K * at_positive
    background_N = (V_N * negative_K.sum() - F_NK @ negative_K) * at_negative
    if retinanet.NORMALIZER == "per_image":
        divisor_N = F_N.clip(min=1)
        foreground, background = (
            (foreground_N / divisor_N).mean(),
            (background_N / divisor_N).mean(),
        )
    else:
        # of one pass of one process
        images = cfg.SOLVER.IMS_PER_BATCH / cfg.SOLVER.ACCUMULATE / processes
        normalizer = LossNormalizer(retinanet.NORMALIZER)
        if retinanet.NORMALIZER == "per_gpu":
            divisor = images * (F_N.mean() + 1)
        else:
            divisor = max(images * F_N.mean(), 1.0)
            if retinanet.NORMALIZER == "ema":
                old, momentum = float(normalizer.ema), normalizer.momentum
                divisor = momentum * old + (1 - momentum) * divisor
        foreground = images * foreground_N.mean() / divisor
        background = images * background_N.mean() / divisor
    return FirstLoss(
        retinanet.PRIOR_PROB,
        str(loss),
        retinanet.NORMALIZER,
        float(foreground),
        float(background),
    )


def loss_findings(first: FirstLoss) -> Iterator[Finding]:
    """The first loss, and a prior that lets the background swamp it (section 3.3)."""
    swamped = first.prior > _LARGE_PRIOR and first.background > first.foreground
    yield Finding(
        Severity.WARNING if swamped else Severity.NOTE,
        "MODEL.RETINANET.PRIOR_PROB",
        f"with {first.prior:g}, {first.loss} and NORMALIZER {first.normalizer} loss_cls of an "
        f"untrained head begins near {first.total:.3g}, of which {first.background:.2g} "
        f"({percent(first.background / first.total)}) is background",
        "set PRIOR_PROB 0.01: the background's gradient may make the training diverge"
        if swamped
        else "another value in the first iteration hints at other weights or another loss",
    )


@dataclass(frozen=True)
class StepCost:
    """One training step, measured.

    Args:
        seconds: median of the timed steps.
        memory_bytes: highest memory of the process, or on a GPU of PyTorch's allocator.
        total_bytes: the memory that there is.
        images: of one process.
        processes: that would train.
        device: in words.
    """

    seconds: float
    memory_bytes: int
    total_bytes: int
    images: int
    processes: int
    device: str

    def hours(self, cfg: CfgNode) -> float:
        """Of the whole training, without evaluations."""
        return self.seconds * cfg.SOLVER.MAX_ITER / 3600


def step_findings(cfg: CfgNode, cost: StepCost) -> Iterator[Finding]:
    """Time and memory of a step, and the length of the training."""
    hours = cost.hours(cfg)
    length = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    share = cost.memory_bytes / cost.total_bytes
    alone = "" if cost.processes == 1 else f" (one of {cost.processes} processes, alone)"
    yield Finding(
        Severity.WARNING if share > _ALMOST_ALL else Severity.NOTE,
        "SOLVER.IMS_PER_BATCH",
        f"a step of {cost.images} images takes {cost.seconds:.3g} s and "
        f"{cost.memory_bytes / 2**30:.2f} of {cost.total_bytes / 2**30:.1f} GiB on "
        f"{cost.device}{alone}; SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER:,} takes {length} without "
        "evaluations",
        "lower it together with SOLVER.BASE_LR, or set SOLVER.ACCUMULATE"
        if share > _ALMOST_ALL
        else "",
    )
