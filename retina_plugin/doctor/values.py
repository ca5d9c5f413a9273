"""Values that a config key cannot have, key by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg

from retina_plugin.config import KEYS, add_retina_config, flatten
from retina_plugin.errors import ConfigError, check_choice

from .findings import Finding, Severity

__all__ = ["check_values", "is_list", "is_number", "is_whole"]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class _Need(NamedTuple):
    """What a value must be."""

    text: str  # completes "must be ..."
    holds: Callable[[Any], bool]


def _whole(least: int, most: float = math.inf) -> _Need:
    limit = f" to {most:g}" if math.isfinite(most) else ""
    text = f"a whole number from {least}{limit or ' on'}"
    return _Need(text, lambda v: is_whole(v) and least <= v <= most)


def _number(text: str, holds: Callable[[Any], bool]) -> _Need:
    return _Need(f"a number {text}", lambda v: is_number(v) and holds(v))


def _list_of(each: _Need, least: int = 1) -> _Need:
    text = f"a list{' of at least one' if least == 1 else ''}, each {each.text}"
    return _Need(text, lambda v: is_list(v) and len(v) >= least and all(map(each.holds, v)))


def _or_none(need: _Need) -> _Need:
    return _Need(f"None or {need.text}", lambda v: v is None or need.holds(v))


def _one_of(*choices: str) -> _Need:
    return _Need(f"one of {', '.join(choices)}", lambda v: v in choices)


_POSITIVE = _number("above 0", lambda v: v > 0)
_NOT_NEGATIVE = _number("from 0 on", lambda v: v >= 0)
_SHARE = _number("from 0 to 1", lambda v: 0 <= v <= 1)
_SHARE_ABOVE_0 = _number("above 0 and up to 1", lambda v: 0 < v <= 1)
_POSITIVES = _list_of(_POSITIVE)
_BY_LEVEL = _list_of(_POSITIVES)
# Detectron2 also takes a list of numbers, for all levels.
_OF_LEVELS = _Need(_BY_LEVEL.text, lambda v: _BY_LEVEL.holds(v) or _POSITIVES.holds(v))
_INCREASING = _Need(
    "a list of numbers above 0 and up to 1, each greater than the one before",
    lambda v: (
        is_list(v)
        and all(is_number(x) and 0 < x <= 1 for x in v)
        and all(a < b for a, b in pairwise(v))
    ),
)

_BOOL = _Need("True or False", lambda v: isinstance(v, bool))
# What Detectron2's get_norm knows.
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_NORM = _Need(f"one of {', '.join(_NORMS)}, or empty", lambda v: v in ("", None, *_NORMS))

# What training and evaluation need.
_ALWAYS: dict[str, _Need] = {
    "DATALOADER.NUM_WORKERS": _whole(0),
    "INPUT.MAX_SIZE_TEST": _whole(1),
    "INPUT.MIN_SIZE_TEST": _whole(0),  # Detectron2: 0 is "no resizing"
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _OF_LEVELS,
    "MODEL.ANCHOR_GENERATOR.OFFSET": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "MODEL.ANCHOR_GENERATOR.SIZES": _OF_LEVELS,
    # torch.device raises for a name that it does not know
    "MODEL.DEVICE": _Need(
        "a device of PyTorch, such as cpu, cuda or cuda:1",
        lambda v: isinstance(v, str) and torch.device(v) is not None,
    ),
    "MODEL.FPN.OUT_CHANNELS": _whole(1),
    "MODEL.PIXEL_MEAN": _list_of(_number("", lambda v: True)),
    "MODEL.PIXEL_STD": _list_of(_POSITIVE),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _Need(
        "4 numbers above 0", lambda v: is_list(v) and len(v) == 4 and all(map(_POSITIVE.holds, v))
    ),
    "MODEL.RETINANET.IN_FEATURES": _Need(
        "a list of at least one name", lambda v: is_list(v) and len(v) > 0
    ),
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.NUM_CLASSES": _whole(1),
    "MODEL.RETINANET.NUM_CONVS": _whole(0),
    "MODEL.RETINANET.PRIOR_PROB": _number("above 0 and below 1", lambda v: 0 < v < 1),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _whole(1),
    "TEST.AUG.ENABLED": _BOOL,
    "TEST.DETECTIONS_PER_IMAGE": _whole(1),
    "TEST.EVALUATORS": _Need(
        "a list of at least one name, each once",
        lambda v: is_list(v) and len(set(v)) == len(v) > 0,
    ),
}

_RESNET = {
    "MODEL.RESNETS.DEPTH": _Need(
        "18, 34, 50, 101 or 152", lambda v: is_whole(v) and v in (18, 34, 50, 101, 152)
    ),
    "MODEL.RESNETS.NORM": _NORM,
}
_PYRAMID = {"MODEL.FPN.FUSE_TYPE": _one_of("sum", "avg"), "MODEL.FPN.NORM": _NORM}

# What both need where another key asks for it: (key, its value) -> what it needs.
_ALWAYS_WHERE: dict[tuple[str, Any], dict[str, _Need]] = {
    ("MODEL.BACKBONE.NAME", "build_resnet_backbone"): _RESNET,
    ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"): _RESNET | _PYRAMID,
    ("MODEL.BACKBONE.NAME", "build_retina_fpn_backbone"): _RESNET | _PYRAMID,
    ("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"): _RESNET | _PYRAMID,
    ("MODEL.BACKBONE.NAME", "build_timm_retina_fpn_backbone"): _PYRAMID,
    ("MODEL.RETINANET.HEAD", "RetinaHead"): {"MODEL.RETINANET.NORM": _NORM},
    ("TEST.AUG.ENABLED", True): {
        "TEST.AUG.FLIP": _BOOL,
        "TEST.AUG.MAX_SIZE": _whole(1),
        "TEST.AUG.MIN_SIZES": _list_of(_whole(1)),
    },
}

# What only a training needs.
_TRAINING: dict[str, _Need] = {
    "DATALOADER.SAMPLER_TRAIN": _one_of(
        "TrainingSampler",
        "RandomSubsetTrainingSampler",
        "RepeatFactorTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.MAX_SIZE_TRAIN": _whole(1),
    "INPUT.MIN_SIZE_TRAIN": _list_of(_whole(0)),  # 0 is "no resizing", as in INPUT.MIN_SIZE_TEST
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": _one_of("none", "horizontal", "vertical"),
    "MODEL.BACKBONE.FREEZE_AT": _whole(0, 5),
    "MODEL.RETINANET.ALPHA_PER_CLASS": _list_of(_SHARE, least=0),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": _or_none(_number("up to 1", lambda v: v <= 1)),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _NOT_NEGATIVE,
    "MODEL.RETINANET.FOCAL_STAR_BETA": _number("", lambda v: True),
    "MODEL.RETINANET.FOCAL_STAR_GAMMA": _POSITIVE,
    "MODEL.RETINANET.HINGE_MARGIN": _SHARE_ABOVE_0,
    "MODEL.RETINANET.IGNORE_IOF_THRESH": _or_none(_SHARE_ABOVE_0),
    "MODEL.RETINANET.IOU_LABELS": _Need(
        "a list of -1, 0 and 1, of which the first is not 1",
        lambda v: is_list(v) and len(v) > 0 and set(v) <= {-1, 0, 1} and v[0] != 1,
    ),
    "MODEL.RETINANET.IOU_THRESHOLDS": _INCREASING,
    "MODEL.RETINANET.OHEM.BATCH_SIZE": _whole(1),
    "MODEL.RETINANET.OHEM.NMS_THRESH": _SHARE,
    "MODEL.RETINANET.OHEM.POSITIVE_FRACTION": _or_none(_SHARE_ABOVE_0),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "SEED": _Need("a whole number below 2^32", lambda v: is_whole(v) and v < 2**32),
    "SOLVER.ACCUMULATE": _whole(1),
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BIAS_LR_FACTOR": _or_none(_NOT_NEGATIVE),
    "SOLVER.CHECKPOINT_PERIOD": _whole(1),
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.IMS_PER_BATCH": _whole(1),
    "SOLVER.LR_SCHEDULER_NAME": _one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.MAX_ITER": _whole(1),
    "SOLVER.MAX_SKIPPED_STEPS": _whole(0),
    "SOLVER.MOMENTUM": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "SOLVER.PROCESS_TIMEOUT": _whole(1),
    "SOLVER.REFERENCE_WORLD_SIZE": _whole(0),
    "SOLVER.STEPS": _Need(
        "a list of whole numbers from 1 on, each greater than the one before",
        lambda v: (
            is_list(v)
            and all(is_whole(x) and x > 0 for x in v)
            and all(a < b for a, b in pairwise(v))
        ),
    ),
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": _whole(0),
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": _or_none(_NOT_NEGATIVE),
    "SOLVER.WEIGHT_DECAY_NORM": _or_none(_NOT_NEGATIVE),
    "TEST.EVAL_PERIOD": _whole(0),  # Detectron2: 0 is "at the end only"
    "TRACKING": _Need(
        "a list of wandb and mlflow, each at most once",
        lambda v: is_list(v) and len(set(v)) == len(v) and set(v) <= {"wandb", "mlflow"},
    ),
    "VIS_PERIOD": _whole(0),
}

# What a training needs where another key asks for it: (key, its value) -> what it needs.
_WHERE: dict[tuple[str, Any], dict[str, _Need]] = {
    ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"): {
        "DATALOADER.RANDOM_SUBSET_RATIO": _SHARE_ABOVE_0
    },
    ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"): {
        "DATALOADER.REPEAT_THRESHOLD": _POSITIVE
    },
    ("INPUT.CROP.ENABLED", True): {
        "INPUT.CROP.SIZE": _Need(
            "2 numbers above 0",
            lambda v: is_list(v) and len(v) == 2 and all(map(_POSITIVE.holds, v)),
        ),
        "INPUT.CROP.TYPE": _one_of("relative_range", "relative", "absolute", "absolute_range"),
    },
    ("SOLVER.CLIP_GRADIENTS.ENABLED", True): {
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm"),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
        # infinity is the maximum norm
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _Need(
            "a number above 0, or inf",
            lambda v: _POSITIVE.holds(v) or v == math.inf,
        ),
    },
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"): {"SOLVER.NUM_DECAYS": _whole(1)},
    ("TEST.PRECISE_BN.ENABLED", True): {"TEST.PRECISE_BN.NUM_ITER": _whole(1)},
}

# What to set instead, where it does not follow from the rule.
_FIXES = {
    "SOLVER.CHECKPOINT_PERIOD": "to save at the end only, set it to SOLVER.MAX_ITER",
    "TEST.AUG.MIN_SIZES": "name the shorter sides of the views",
    "TEST.EVAL_PERIOD": "0 evaluates at the end only",
}


def check_values(cfg: CfgNode, eval_only: bool) -> Iterator[Finding]:
    """Keys with a value that they cannot have, each by itself.

    Args:
        eval_only: leave out what only a training reads.
    """
    flat = flatten(cfg)
    yield from _check_none(flat)
    needs = _ALWAYS | ({} if eval_only else _TRAINING)
    for (key, value), where in (_ALWAYS_WHERE | ({} if eval_only else _WHERE)).items():
        if flat.get(key) == value:
            needs |= where
            for missing in where.keys() - flat.keys():
                what = f"is not in the config, but {key} {value} reads it"
                yield Finding(Severity.ERROR, missing, what, "add it")
    for key, need in needs.items():
        if key in flat and not _holds(need, flat[key]):
            yield Finding(
                Severity.ERROR, key, f"must be {need.text}, got {flat[key]!r}", _FIXES.get(key, "")
            )
    for key, known in KEYS.items():
        # The precisions are checked together with the device, and the backend with the machine.
        if known.choices and "PRECISION" not in key and "BACKEND" not in key:
            try:
                check_choice(key, flat[key], known.choices)
            except ConfigError as error:
                yield Finding(Severity.ERROR, key, str(error).removeprefix(f"{key}: "))


def _check_none(flat: Mapping[str, Any]) -> Iterator[Finding]:
    """None for a number, a name or a list: Detectron2 takes it for a value of any type."""
    tables = [_ALWAYS, _TRAINING, *_ALWAYS_WHERE.values(), *_WHERE.values()]
    for key, default in flatten(add_retina_config(get_cfg())).items():
        if flat.get(key, default) is not None or any(key in table for table in tables):
            continue
        # For a switch, a norm, or a text that is empty by default, None means "no".
        if isinstance(default, bool) or default in (None, "") or key.endswith("NORM"):
            continue
        if key not in KEYS or not KEYS[key].choices:
            yield Finding(
                Severity.ERROR, key, "must not be None", f"the default is {default!r:.100}"
            )


def _holds(need: _Need, value: Any) -> bool:
    try:
        return bool(need.holds(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of a strange type, or no device
        return False
