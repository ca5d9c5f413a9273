"""What the data decides: classes, weights, image size, anchors, flips."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode

from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.doctor.flips import flip_findings
from retina_plugin.doctor.ground_truth import training_sizes
from retina_plugin.doctor.matches import has_anchors, iou_limits
from retina_plugin.doctor.recall import AnchorFit, anchor_fit, measure, percent
from retina_plugin.doctor.suggest import suggest_anchors

from .facts import Facts
from .settings import Recipe

__all__ = [
    "best_size",
    "decide_anchors",
    "decide_classes",
    "decide_flips",
    "decide_image_size",
    "decide_weights",
    "from_scratch",
    "is_timm",
]

_SMALL = 16  # pixels: two cells of P3, the finest level of the pyramid
_SMALL_SHARE = 0.1  # of the boxes may be smaller
_ENLARGED = 2.0  # times: more costs its square and shows no more detail
_LARGEST = 1344  # pixels: the longer side of the paper's largest images (1333)
_NEAR = 1.25  # a size that near to one that has a reason of its own becomes that one
_LEVEL = 32  # pixels: sizes are multiples of the stride of P5
_NAMES = 100  # classes that a comment names
_COCO_LIMIT = 100  # detections of an image
_FEW_MISSED = 0.01  # boxes without an anchor above background


def decide_classes(recipe: Recipe, facts: Facts) -> None:
    """Datasets and classes."""
    text = f"{facts.images:,} images with {len(facts.gt.boxes_G4):,} boxes"
    if facts.empty:
        text += (
            f". {facts.empty:,} more images have no box. DATALOADER.FILTER_EMPTY_ANNOTATIONS "
            f"{recipe.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS} "
            + (
                "leaves them out; False trains on them as background"
                if recipe.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
                else "trains on them as background"
            )
        )
    recipe.set("DATASETS.TRAIN", (facts.train,), text)
    if facts.val is None:
        recipe.set(
            "DATASETS.TEST",
            (),
            "no --val was given: no AP is measured. `retina split DATASET --output DIR` makes "
            "train and val of one set",
        )
        recipe.warn("no --val was given, so no AP is measured: `retina split` makes a val set")
    else:
        recipe.set("DATASETS.TEST", (facts.val,), f"{facts.val_images:,} images, for AP alone")
    names = ", ".join(facts.class_names[:_NAMES])
    more = len(facts.class_names) - _NAMES
    names += f" and {more} more" if more > 0 else ""
    recipe.set("MODEL.RETINANET.NUM_CLASSES", len(facts.class_names), f"in this order: {names}")
    if facts.crowded > _COCO_LIMIT:
        recipe.set(
            "TEST.DETECTIONS_PER_IMAGE",
            -(-facts.crowded // _COCO_LIMIT) * _COCO_LIMIT,
            f"one image in a hundred has more than {facts.crowded} boxes; AP counts the first "
            f"{_COCO_LIMIT} detections all the same",
        )


def from_scratch(recipe: Recipe) -> bool:
    """Whether the training starts from random weights."""
    return not recipe.cfg.MODEL.WEIGHTS


def is_timm(cfg: CfgNode) -> bool:
    """Whether the backbone is timm's, which reads its own keys."""
    return cfg.MODEL.BACKBONE.NAME == "build_timm_retina_fpn_backbone"


def decide_weights(recipe: Recipe, problem: str) -> None:
    """The weights to start from; without any, a model that can be trained from scratch.

    Args:
        problem: why ``MODEL.WEIGHTS`` is not available; "" if it is.
    """
    wanted = recipe.cfg.MODEL.WEIGHTS
    if problem and "MODEL.WEIGHTS" not in recipe.given:
        recipe.warn(
            f"{wanted} is not available here ({problem}), so this file trains from scratch, which "
            "takes longer and reaches less. If you can get the weights, run `retina init` again "
            "with MODEL.WEIGHTS FILE at the end of the command"
        )
        recipe.set("MODEL.WEIGHTS", "", f"random: {wanted} is not available here, see above")
    elif from_scratch(recipe):
        recipe.set("MODEL.WEIGHTS", "", "random, as in the base")
    else:
        recipe.set("MODEL.WEIGHTS", wanted, "as in the base; training starts from them")
    if not from_scratch(recipe):
        return
    cfg = recipe.cfg
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        recipe.set("MODEL.BACKBONE.FREEZE_AT", 0, "random weights must not be frozen")
    why = (
        "a training from scratch needs norms that are trained (He et al., arXiv:1811.08883); "
        "group norm does not depend on the batch"
    )
    widths = (cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS)
    norm = "BN" if any(w % 32 for w in (*widths, cfg.MODEL.FPN.OUT_CHANNELS)) else "GN"
    if is_timm(cfg) and cfg.MODEL.TIMM.NORM == "FrozenBN":
        recipe.set("MODEL.TIMM.NORM", "BN", why)
    elif not is_timm(cfg) and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        recipe.set("MODEL.RESNETS.NORM", norm, why)
    for key in ("MODEL.FPN.NORM", "MODEL.RETINANET.NORM"):
        if not recipe.value(key):
            recipe.set(key, norm, why)


def best_size(facts: Facts, base_size: int) -> tuple[int, str]:
    """The shorter side of the images (pixels), and why.

    It is the one at which nine boxes in ten are at least as long as two cells of P3: in smaller
    ones the head sees no shape, and few anchors lie near them. Images that need no enlarging keep
    their size, or become as small as the base's.
    """
    small = float(np.quantile(facts.sides_G, _SMALL_SHARE))
    own = facts.short_side
    wanted = _SMALL / small
    low, high = min(own, base_size), max(min(own * _ENLARGED, _LARGEST), min(own, base_size))
    size = float(np.clip(wanted, low, high))
    why = (
        f"{percent(1 - _SMALL_SHARE)} of the boxes are at least {small * own:.3g} px long "
        f"(square root of the area) in images of {own} px"
    )
    near = [x for x in (base_size, own) if 1 / _NEAR <= x / size <= _NEAR]
    if near:
        best = min(near, key=lambda x: abs(np.log(x / size)))
        return best, f"{'the size of the images' if best == own else 'as in the base'}: {why}"
    rounded = max(_LEVEL, round(size / _LEVEL) * _LEVEL)
    if rounded >= wanted * 0.95:
        return rounded, f"{why}: here they have {_SMALL} px, two cells of P3"
    return rounded, (
        f"{why}: they would need {wanted:.0f} px to be {_SMALL} px long, two cells of P3, but "
        + (f"images are enlarged {_ENLARGED:g} times at most" if rounded < _LARGEST else
           f"{_LARGEST} px is the most; smaller images cut out of these would show more")
    )  # fmt: skip


def decide_image_size(recipe: Recipe, facts: Facts) -> None:
    """The shorter side of the images, and the limit of the longer one."""
    base = max(training_sizes(recipe.cfg)) or facts.short_side
    size, why = best_size(facts, base)
    sampling = "INPUT.MIN_SIZE_TRAIN_SAMPLING"
    is_range = recipe.value(sampling) == "range"
    ends = 2 if is_range and sampling in recipe.given else 1  # of a range, which the user asked for
    recipe.set("INPUT.MIN_SIZE_TRAIN", (size,) * ends, why)
    if is_range and len(recipe.cfg.INPUT.MIN_SIZE_TRAIN) == 1:
        recipe.set(sampling, "choice", 'there is one size; the base\'s "range" needs two')
    size = max(training_sizes(recipe.cfg))
    aspect = max(facts.aspect, recipe.cfg.INPUT.MAX_SIZE_TRAIN / base if size else 1.0)
    longest = int(np.ceil(size * aspect)) if size else recipe.cfg.INPUT.MAX_SIZE_TRAIN
    why = (
        f"the base's limit for this size; the images' longer sides are {facts.aspect:.3g} times "
        "the shorter ones, or less"
        if aspect > facts.aspect
        else f"so that images with sides of 1 to {facts.aspect:.3g} are not made smaller"
    )
    recipe.set("INPUT.MAX_SIZE_TRAIN", longest, why)
    recipe.set("INPUT.MIN_SIZE_TEST", size, "as in training")
    recipe.set("INPUT.MAX_SIZE_TEST", recipe.cfg.INPUT.MAX_SIZE_TRAIN, "as in training")


def decide_anchors(recipe: Recipe, facts: Facts) -> None:
    """Anchors that the boxes need, if the base's are not enough."""
    cfg = recipe.cfg
    if not has_anchors(cfg):
        return
    grid = AnchorGrid.from_cfg(cfg)
    fit = anchor_fit(cfg, grid, facts.gt, facts.class_names)
    found = suggest_anchors(cfg, grid, facts.gt, fit, resize=False)
    sizes, ratios = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    now = f"{percent(fit.total.upper)} of the boxes have one with IoU >= {fit.upper_iou:g}"
    if found is None or recipe.given & {sizes, ratios}:
        for key in (sizes, ratios):
            recipe.set(key, recipe.value(key), f"the base's anchors: {now}")
    else:
        recipe.set(
            sizes,
            [list(level) for level in found.sizes],
            f"of P3, P4, ... (pixels): {percent(found.then.upper)} of the boxes have an anchor "
            f"with IoU >= {fit.upper_iou:g}; the base's anchors: {percent(found.now.upper)}",
        )
        recipe.set(ratios, [sorted(set(found.ratios))], "height over width, from the boxes too")
    _decide_matches(recipe, facts, fit)


def _decide_matches(recipe: Recipe, facts: Facts, fit: AnchorFit) -> None:
    key = "MODEL.RETINANET.LOW_QUALITY_MATCHES"
    lower, _ = iou_limits(recipe.cfg)
    grid = AnchorGrid.from_cfg(recipe.cfg)
    limit = recipe.cfg.INPUT.MAX_SIZE_TRAIN
    iou_TG = measure(grid, facts.gt, fit.sizes, limit).iou_TG
    missed = float((iou_TG < lower).mean())
    text = f"{percent(missed)} of the boxes have no anchor with IoU >= {lower:g}"
    if missed > _FEW_MISSED:
        recipe.set(key, "always", f"{text}; their nearest anchors learn them all the same")
    else:
        recipe.set(key, recipe.value(key), f"as in the base: {text}")


def decide_flips(recipe: Recipe, facts: Facts) -> None:
    """No flip that makes one class look like another."""
    key = "INPUT.RANDOM_FLIP"
    found = next(iter(flip_findings(recipe.cfg, facts.class_names)), None)
    if found is not None:
        recipe.set(key, "none", f"the base's {found.what}")
    elif recipe.cfg.INPUT.RANDOM_FLIP == "none":
        recipe.set(key, "none", "as in the base")
    else:
        recipe.set(
            key,
            recipe.cfg.INPUT.RANDOM_FLIP,
            "as in the base: no class is named like another's mirror image, text or a direction. "
            'Set "none" if mirrored objects are wrong',
        )
