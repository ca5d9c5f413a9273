"""Keys of a config that have impossible values, or that contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from PIL import Image

from retina_plugin.errors import ConfigError, check_choice
from retina_plugin.evaluation import EVALUATOR_REGISTRY
from retina_plugin.losses import check_backend
from retina_plugin.optional import optional

from .findings import Finding, Severity
from .matches import has_anchors
from .model import check_detector, check_parts
from .schedule import check_schedule
from .values import check_values, is_list, is_number

__all__ = ["check_config"]

# RetinaNet reads no key of MODEL.ROI_HEADS. Name there -> the key to set instead.
_INSTEAD_OF_ROI_HEADS = {
    "NAME": "MODEL.RETINANET.HEAD",
    "NUM_CLASSES": "MODEL.RETINANET.NUM_CLASSES",
    "IN_FEATURES": "MODEL.RETINANET.IN_FEATURES",
    "SCORE_THRESH_TEST": "MODEL.RETINANET.SCORE_THRESH_TEST",
    "NMS_THRESH_TEST": "MODEL.RETINANET.NMS_THRESH_TEST",
    "IOU_THRESHOLDS": "MODEL.RETINANET.IOU_THRESHOLDS",
    "IOU_LABELS": "MODEL.RETINANET.IOU_LABELS",
    "BATCH_SIZE_PER_IMAGE": "MODEL.RETINANET.SAMPLER",
    "POSITIVE_FRACTION": "MODEL.RETINANET.SAMPLER",
}

# Anchor generators that read one list a level, or one for all. Another one may read them otherwise.
_ANCHORS_BY_LEVEL = (
    "DefaultAnchorGenerator",
    "DetectronAnchorGenerator",
    "TorchvisionAnchorGenerator",
)


def check_config(cfg: CfgNode, eval_only: bool = False) -> Iterator[Finding]:
    """Impossible values, keys that contradict each other, keys without an effect.

    Args:
        eval_only: leave out what only a training reads.
    """
    bad = list(check_values(cfg, eval_only))
    yield from bad
    impossible = {finding.where for finding in bad}
    checks: list[tuple[Callable[[CfgNode], Iterator[Finding]], bool]] = [
        (_check_pixels, False),
        (_check_parts, False),
        (_check_anchors, False),
        (_check_top_levels, False),
        (check_schedule, True),
        (_check_iou_labels, True),
        (_check_training_sizes, True),
        (_check_loss, True),
        (_check_views, False),
        (_check_evaluators, False),
        (_check_roi_heads, False),
    ]
    for check, training in checks:
        if training and eval_only:
            continue
        try:
            found = list(check(cfg))
        except TypeError:  # it compares a value that was found impossible
            if not bad:
                raise
            continue
        # A key that is impossible by itself needs no second finding.
        yield from (finding for finding in found if finding.where not in impossible)


def _check_evaluators(cfg: CfgNode) -> Iterator[Finding]:
    """Now, because the trainer builds them only when the first evaluation begins."""
    key = EVALUATOR_REGISTRY.key
    for name in cfg.TEST.EVALUATORS if cfg.DATASETS.TEST else ():
        try:
            check_choice(key, name, sorted(known for known, _ in EVALUATOR_REGISTRY))
            for package in getattr(EVALUATOR_REGISTRY.get(name), "PACKAGES", ()):
                optional(package, name)
        except ConfigError as error:
            yield _error(key, str(error).removeprefix(f"{key}: "))


def _error(key: str, what: str, fix: str = "") -> Finding:
    return Finding(Severity.ERROR, key, what, fix)


def _check_pixels(cfg: CfgNode) -> Iterator[Finding]:
    mean, std, image_format = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if is_list(mean) and is_list(std) and len(mean) != len(std):
        yield _error(
            "MODEL.PIXEL_STD",
            f"has {len(std)} numbers, but MODEL.PIXEL_MEAN has {len(mean)}",
            "give both one number a channel",
        )
    try:
        name = "RGB" if image_format in ("BGR", "YUV-BT.601") else image_format
        channels = len(Image.new("RGB", (1, 1)).convert(name).getbands())
    except (ValueError, TypeError):
        return  # the mapper says what is known
    if is_list(mean) and len(mean) != channels:
        yield _error(
            "MODEL.PIXEL_MEAN",
            f"has {len(mean)} numbers, but INPUT.FORMAT {image_format} has {channels} channels",
            "give it one number a channel",
        )


def _check_parts(cfg: CfgNode) -> Iterator[Finding]:
    yield from check_detector(cfg)
    if has_anchors(cfg):  # a detector of the user's own may read these keys otherwise
        yield from check_parts(cfg)


def _check_anchors(cfg: CfgNode) -> Iterator[Finding]:
    generator, levels = cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.RETINANET.IN_FEATURES
    if not has_anchors(cfg):
        return
    key = "MODEL.ANCHOR_GENERATOR.NAME"
    try:
        check_choice(key, generator.NAME, [name for name, _ in ANCHOR_GENERATOR_REGISTRY])
    except ConfigError as error:
        yield _error(key, str(error).removeprefix(f"{key}: "))
        return
    if getattr(ANCHOR_GENERATOR_REGISTRY.get(generator.NAME), "box_dim", 4) != 4:
        what = f"{generator.NAME} gives no boxes of four numbers, which RetinaNet needs"
        yield _error(key, what, "set it to DefaultAnchorGenerator")
    if generator.NAME not in _ANCHORS_BY_LEVEL:
        return
    for name in ("SIZES", "ASPECT_RATIOS"):
        given = generator[name]
        if is_list(given) and given and not is_list(given[0]):
            continue  # numbers for all levels
        if is_list(given) and is_list(levels) and len(given) not in (1, len(levels)):
            yield _error(
                f"MODEL.ANCHOR_GENERATOR.{name}",
                f"has {len(given)} lists for the {len(levels)} levels of "
                "MODEL.RETINANET.IN_FEATURES",
                "give it one list for all levels, or one a level",
            )


def _check_top_levels(cfg: CfgNode) -> Iterator[Finding]:
    source, builder = cfg.MODEL.RETINANET.P6_SOURCE, cfg.MODEL.BACKBONE.NAME
    if source != "res5" and builder == "build_retinanet_resnet_fpn_backbone":
        yield _error(
            "MODEL.RETINANET.P6_SOURCE",
            f"{source} is not read by MODEL.BACKBONE.NAME {builder}",
            "set MODEL.BACKBONE.NAME build_retina_fpn_backbone",
        )
    if not cfg.MODEL.RETINANET.RELU_BEFORE_P7 and builder == "build_retinanet_resnet_fpn_backbone":
        yield _error(
            "MODEL.RETINANET.RELU_BEFORE_P7",
            f"False is not read by MODEL.BACKBONE.NAME {builder}",
            "set MODEL.BACKBONE.NAME build_retina_fpn_backbone",
        )


def _check_iou_labels(cfg: CfgNode) -> Iterator[Finding]:
    thresholds, labels = cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS
    if is_list(thresholds) and is_list(labels) and len(labels) != len(thresholds) + 1:
        yield _error(
            "MODEL.RETINANET.IOU_LABELS",
            f"must be {len(thresholds) + 1} labels for MODEL.RETINANET.IOU_THRESHOLDS "
            f"{thresholds}, got {labels}",
        )


def _check_training_sizes(cfg: CfgNode) -> Iterator[Finding]:
    sizes, crop = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if is_range and (len(sizes) != 2 or sizes[0] > sizes[1]):
        yield _error(
            "INPUT.MIN_SIZE_TRAIN",
            f"must be the least and the greatest size for MIN_SIZE_TRAIN_SAMPLING range, "
            f"got {sizes}",
        )
    is_relative = crop.ENABLED and str(crop.TYPE).startswith("relative")
    if is_relative and any(is_number(side) and side > 1 for side in crop.SIZE):
        yield _error(
            "INPUT.CROP.SIZE",
            f"must be shares of the image up to 1 for INPUT.CROP.TYPE {crop.TYPE}, got {crop.SIZE}",
        )


def _check_loss(cfg: CfgNode) -> Iterator[Finding]:
    retinanet, amp = cfg.MODEL.RETINANET, cfg.SOLVER.AMP
    alphas = retinanet.ALPHA_PER_CLASS
    if len(alphas) not in (0, retinanet.NUM_CLASSES):
        yield _error(
            "MODEL.RETINANET.ALPHA_PER_CLASS",
            f"has {len(alphas)} numbers for {retinanet.NUM_CLASSES} classes "
            "(MODEL.RETINANET.NUM_CLASSES)",
        )
    key = "MODEL.RETINANET.LOSS_BACKEND"
    try:
        check_backend(retinanet.LOSS_BACKEND)
    except ConfigError as error:
        yield _error(key, str(error).removeprefix(key).lstrip(": "))
    key = "MODEL.RETINANET.LOSS_IN_PLACE"
    if retinanet.LOSS_IN_PLACE and retinanet.SAMPLER == "OHEM":
        yield _error(
            key,
            "has no effect with MODEL.RETINANET.SAMPLER OHEM, whose loss is that of a few anchors",
            "set LOSS_IN_PLACE False",
        )
    if retinanet.LOSS_IN_PLACE and amp.ENABLED and amp.PRECISION == "float16":
        yield _error(
            key,
            "writes gradients before they are scaled, and float16 cannot hold those",
            "set SOLVER.AMP.PRECISION bfloat16, or LOSS_IN_PLACE False",
        )


def _check_views(cfg: CfgNode) -> Iterator[Finding]:
    aug = cfg.TEST.AUG
    if aug.ENABLED and aug.FLIP and cfg.INPUT.RANDOM_FLIP == "none":
        yield Finding(
            Severity.WARNING,
            "TEST.AUG.FLIP",
            "detects in mirrored images too, but with INPUT.RANDOM_FLIP none the training has none",
            "set TEST.AUG.FLIP False",
        )


def _check_roi_heads(cfg: CfgNode) -> Iterator[Finding]:
    defaults = get_cfg().MODEL.ROI_HEADS
    for name, value in cfg.MODEL.ROI_HEADS.items():
        if name not in defaults or value != defaults[name]:
            instead = _INSTEAD_OF_ROI_HEADS.get(name)
            yield Finding(
                Severity.WARNING,
                f"MODEL.ROI_HEADS.{name}",
                f"is set to {value}, but RetinaNet does not read it",
                f"use {instead}" if instead else "",
            )
