"""``--resume``: what differs between the checkpoint and the config, and what then happens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from torch import nn

from retina_plugin.config import flatten
from retina_plugin.errors import ConfigError

__all__ = ["check_resumable", "keep_hyperparameters", "log_differences"]

logger = logging.getLogger("retina_plugin")

_HONOURED = "honoured from here on"
_OTHER_DATA = "honoured, but from here on the training sees other images"
_OTHER_MODEL = "honoured, but from here on the model computes something else"

# Beginning of a key -> what a new value does, and whether it deserves a warning. The first one
# that fits counts.
_EFFECTS: dict[str, tuple[str, bool]] = {
    "SOLVER.IMS_PER_BATCH": ("honoured, but from here on the batches are others", True),
    "SOLVER.CHECKPOINT_PERIOD": ("harmless", False),
    "SOLVER": (_HONOURED, False),
    "SEED": ("no effect: the checkpoint has the random numbers and the order", True),
    "MODEL.WEIGHTS": ("no effect: the weights are the checkpoint's", False),
    "MODEL.DEVICE": ("harmless, apart from rounding", False),
    "MODEL.COMPILE": ("harmless, apart from rounding", False),
    "MODEL.CHANNELS_LAST": ("harmless, apart from rounding", False),
    "MODEL.ACTIVATION_CHECKPOINTING": ("harmless", False),
    "MODEL.RETINANET.LOSS_BACKEND": ("harmless, apart from rounding", False),
    "MODEL.RETINANET.LOSS_IN_PLACE": ("harmless", False),
    "MODEL.RETINANET.SCORE_THRESH_TEST": (_HONOURED, False),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": (_HONOURED, False),
    "MODEL.RETINANET.NMS_THRESH_TEST": (_HONOURED, False),
    "MODEL.ROI": ("harmless: RetinaNet does not read it", False),
    "MODEL.RPN": ("harmless: RetinaNet does not read it", False),
    "MODEL": (_OTHER_MODEL, True),
    "DATASETS.TEST": (_HONOURED, False),
    "DATASETS.PROPOSAL_FILES_TEST": (_HONOURED, False),
    "DATASETS": (_OTHER_DATA, True),
    "DATALOADER.NUM_WORKERS": ("harmless", False),
    "DATALOADER": (_OTHER_DATA, True),
    "INPUT.MIN_SIZE_TEST": (_HONOURED, False),
    "INPUT.MAX_SIZE_TEST": (_HONOURED, False),
    "INPUT": (_OTHER_DATA, True),
    "TEST": (_HONOURED, False),
    "VIS_PERIOD": ("harmless", False),
    "CUDNN_BENCHMARK": ("harmless, apart from rounding", False),
    "": (_HONOURED, False),
}
# Of the optimizer's groups, which Detectron2 makes of the parameters that share their values.
_GROUP_KEYS = ("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "BIAS_LR_FACTOR")
# Not in the model-zoo's files, or not in those of older versions.
_OPTIONAL = ("pixel_mean", "pixel_std", "num_batches_tracked", "cell_anchors")


def _differences(saved: str | None, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the checkpoint, value now), of the keys whose values differ."""
    if saved is None:
        return {}
    before, now = flatten(yaml.safe_load(saved)), flatten(yaml.safe_load(cfg.dump()))
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "OUTPUT_DIR"
    }


def _effect(key: str) -> tuple[str, bool]:
    return next(effect for start, effect in _EFFECTS.items() if key.startswith(start))


def check_resumable(
    path: str,
    checkpoint: Mapping[str, Any],
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """The model and the optimizer are those of the checkpoint.

    Raises:
        ConfigError: they are not. It names the keys that differ, and the fix.
    """
    start_new = f"set MODEL.WEIGHTS {path} and a new OUTPUT_DIR, and leave out --resume"
    if "trainer" not in checkpoint:
        raise ConfigError(
            f"--resume: {path} holds weights and no training; to train from them, {start_new}"
        )
    saved = checkpoint.get("resume", {})
    keys: Sequence[str] = ("MODEL", "IMPORTS")
    mismatch = _model_mismatch(checkpoint["model"], model)
    if mismatch is None:
        keys = (*keys, *(f"SOLVER.{name}" for name in _GROUP_KEYS))
        groups = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]
        mismatch = _optimizer_mismatch(groups, saved.get("parameters"), model, optimizer)
    if mismatch is None:
        return
    changed = [
        f"{key} {before} (now {now})"
        for key, (before, now) in _differences(saved.get("config"), cfg).items()
        if key.startswith(tuple(keys)) and _effect(key)[0] in (_OTHER_MODEL, _HONOURED)
    ]
    reason = f"{', '.join(changed)}, and {mismatch}" if changed else mismatch
    raise ConfigError(
        f"--resume: {path} was trained with {reason}; set that back, or, to train on from its "
        f"weights, {start_new}"
    )


def _model_mismatch(saved: Mapping[str, Any], model: nn.Module) -> str | None:
    """The first parameter that differs, after "the checkpoint was trained with"; None if none."""
    own = model.state_dict()
    for name in (*own, *saved):
        if name.rpartition(".")[2] in _OPTIONAL or "anchor_generator" in name:
            continue
        if name not in own:
            return f"a parameter {name}, which the model does not have"
        if name not in saved:
            return f"no parameter {name}"
        shape, now = tuple(saved[name].shape), tuple(own[name].shape)
        if shape != now:
            return f"{name} of shape {shape}, not {now}"
    return None


def _optimizer_mismatch(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> str | None:
    own_groups = [group["params"] for group in optimizer.param_groups]
    sizes, now = [len(g["params"]) for g in groups], [len(g) for g in own_groups]
    if sum(sizes) != sum(now):
        return f"{sum(sizes)} trainable parameters, not {sum(now)}"
    own_names = {parameter: name for name, parameter in model.named_parameters()}
    if sizes != now or (
        names is not None and names != [[own_names.get(p, "?") for p in g] for g in own_groups]
    ):
        return "other groups of parameters in the optimizer"
    return None


def keep_hyperparameters(
    optimizer: torch.optim.Optimizer, scheduler: Any, own: Sequence[Mapping[str, Any]]
) -> None:
    """Learning rate, momentum and weight decay become the config's again after a checkpoint.

    Detectron2 takes them from the checkpoint, so that a new ``SOLVER.BASE_LR`` has no effect.

    Args:
        optimizer, scheduler: with the state of the checkpoint.
        own: the optimizer's groups as the config made them, without "params".
    """
    if not isinstance(scheduler, LRMultiplier):
        return  # of the user: its learning rates may depend on the ones before
    for group, values in zip(optimizer.param_groups, own):
        group.update(values)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if scheduler.last_epoch > scheduler._max_iter:
        return  # MAX_ITER was lowered: nothing is left to train, and the schedule has no rate
    for group, rate in zip(optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def log_differences(path: str, checkpoint: Mapping[str, Any], cfg: CfgNode) -> None:
    """Log each key whose value differs from the checkpoint's, with what comes of it."""
    saved = checkpoint.get("resume")
    if saved is None:
        logger.warning(
            "%s is of Detectron2's trainer or of an older version: the order of the images, the "
            "random numbers and the averages of the log begin anew",
            path,
        )
        return
    differences = _differences(saved["config"], cfg)
    if not differences:
        return
    rows = [
        f"  {key}: {before} -> {now} ({_effect(key)[0]})"
        for key, (before, now) in differences.items()
    ]
    warns = any(_effect(key)[1] for key in differences)
    logger.log(
        logging.WARNING if warns else logging.INFO,
        "The config differs from that of %s:\n%s",
        *(path, "\n".join(rows)),
    )
