"""Checks of a config, its datasets, its weights and the machine, before anything is built.

Each raises a :class:`ConfigError`, which is one line with the key and what to do.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import Detectron2Handler

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice, did_you_mean
from retina_plugin.losses import check_backend
from retina_plugin.weights.downloads import download

__all__ = [
    "check_batch_size",
    "check_compiler",
    "check_config",
    "check_datasets",
    "check_devices",
    "check_num_classes",
    "check_precision",
    "check_run",
    "check_weights",
]

logger = logging.getLogger("retina_plugin")

_COCO_LAYOUT = (
    "coco/annotations/instances_{train,val}2017.json and coco/{train,val}2017/ "
    "(for test-dev also coco/annotations/image_info_test-dev2017.json and coco/test2017/)"
)

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


def check_run(
    cfg: CfgNode, num_gpus: int | None, *, eval_only: bool = False, resume: bool = False
) -> int:
    """All checks of a training or an evaluation that need no model.

    ``cfg.MODEL.DEVICE`` "cuda" becomes "cpu" if no GPU is used. The embedded dataset is written if
    ``cfg`` names it.

    Args:
        num_gpus: see :func:`check_devices`.
        eval_only: evaluate and do not train.
        resume: use the last checkpoint of ``OUTPUT_DIR``, if there is one, and not the weights.

    Returns:
        The number of GPUs to use.
    """
    check_config(cfg, eval_only)
    num_gpus = check_devices(cfg, num_gpus, eval_only)
    has_checkpoint = os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if not (resume and has_checkpoint):
        if eval_only and not cfg.MODEL.WEIGHTS:
            raise ConfigError("--eval-only: set MODEL.WEIGHTS to the checkpoint to evaluate")
        check_weights(cfg)
    return num_gpus


def check_config(cfg: CfgNode, eval_only: bool = False) -> None:
    """Keys that contradict each other, and the datasets. Keys without an effect give a warning."""
    if not eval_only:
        _check_training_keys(cfg)
    check_datasets(cfg, ("TEST",) if eval_only else ("TRAIN", "TEST"))
    check_num_classes(cfg)
    _check_p6_source(cfg)
    _warn_roi_heads(cfg)


def _check_training_keys(cfg: CfgNode) -> None:
    solver, retinanet = cfg.SOLVER, cfg.MODEL.RETINANET
    for name in ("IMS_PER_BATCH", "ACCUMULATE"):
        if solver[name] < 1:
            raise ConfigError(f"SOLVER.{name} must be at least 1, got {solver[name]}")
    if solver.PROCESS_TIMEOUT < 1:
        raise ConfigError(
            f"SOLVER.PROCESS_TIMEOUT must be at least 1, got {solver.PROCESS_TIMEOUT}"
        )
    check_backend(retinanet.LOSS_BACKEND)
    if retinanet.LOSS_IN_PLACE and retinanet.SAMPLER == "OHEM":
        raise ConfigError(
            "MODEL.RETINANET.LOSS_IN_PLACE has no effect with MODEL.RETINANET.SAMPLER OHEM, whose "
            "loss is that of a few anchors: set LOSS_IN_PLACE False"
        )
    if retinanet.LOSS_IN_PLACE and solver.AMP.ENABLED and solver.AMP.PRECISION == "float16":
        raise ConfigError(
            "MODEL.RETINANET.LOSS_IN_PLACE writes gradients before they are scaled, and float16 "
            "cannot hold those: set SOLVER.AMP.PRECISION bfloat16, or LOSS_IN_PLACE False"
        )


def _check_p6_source(cfg: CfgNode) -> None:
    source, builder = cfg.MODEL.RETINANET.P6_SOURCE, cfg.MODEL.BACKBONE.NAME
    if source != "res5" and builder == "build_retinanet_resnet_fpn_backbone":
        raise ConfigError(
            f"MODEL.RETINANET.P6_SOURCE {source} is not read by MODEL.BACKBONE.NAME {builder}: "
            "set MODEL.BACKBONE.NAME build_retina_fpn_backbone"
        )


def _warn_roi_heads(cfg: CfgNode) -> None:
    defaults = get_cfg().MODEL.ROI_HEADS
    for name, value in cfg.MODEL.ROI_HEADS.items():
        if name not in defaults or value != defaults[name]:
            instead = _INSTEAD_OF_ROI_HEADS.get(name)
            logger.warning(
                "MODEL.ROI_HEADS.%s is set to %s, but RetinaNet does not read it%s",
                name,
                value,
                f": use {instead}" if instead else "",
            )


def check_datasets(cfg: CfgNode, splits: tuple[str, ...] = ("TRAIN", "TEST")) -> None:
    """The datasets of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` are registered and have their files.

    Writes the embedded dataset if it is named and not there yet.
    """
    for split in splits:
        names = cfg.DATASETS[split]
        if split == "TRAIN" and not names:
            raise ConfigError(
                "DATASETS.TRAIN is empty: name a registered dataset, e.g. "
                '("coco_2017_train",) or ("digits_scenes_train",)'
            )
        for name in names:
            _check_dataset(f"DATASETS.{split}", name)


def _check_dataset(key: str, name: str) -> None:
    if name not in DatasetCatalog:
        raise ConfigError(
            f"{key}: no dataset '{name}' is registered{did_you_mean(name, DatasetCatalog.list())}; "
            "register yours with detectron2.data.datasets.register_coco_instances before training "
            "(see the README)"
        )
    metadata = MetadataCatalog.get(name)
    prepare = metadata.get("prepare")
    if prepare is not None:
        try:
            prepare()
        except ModuleNotFoundError as error:  # an extra is not installed; the message says which
            raise ConfigError(f"{key}: {name}: {error}") from None
    for attribute in ("json_file", "image_root"):
        path = metadata.get(attribute)
        if path is None or "://" in path or os.path.exists(path):
            continue
        if name.startswith("coco_"):
            root = os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
            fix = (
                f"put COCO under {root} as {_COCO_LAYOUT}, or set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds coco/"
            )
        else:
            fix = f"check the {attribute} with which the dataset was registered"
        raise ConfigError(f"{key}: {name} has no {attribute} at {path}: {fix}")


def check_num_classes(cfg: CfgNode) -> None:
    """``MODEL.RETINANET.NUM_CLASSES`` is the number of classes of every dataset.

    A dataset whose classes are not known passes. Some know them only once they are loaded.
    """
    expected = cfg.MODEL.RETINANET.NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != expected:
            raise ConfigError(
                f"MODEL.RETINANET.NUM_CLASSES is {expected}, but {name} has {len(classes)} "
                f"classes: set MODEL.RETINANET.NUM_CLASSES {len(classes)} "
                "(MODEL.ROI_HEADS.NUM_CLASSES has no effect on RetinaNet)"
            )


def check_devices(cfg: CfgNode, num_gpus: int | None, eval_only: bool = False) -> int:
    """The number of GPUs to use. If it is 0, ``cfg.MODEL.DEVICE`` "cuda" becomes "cpu".

    Also checks what the config asks of the device: the precision, and a compiler for
    ``MODEL.COMPILE``.

    Args:
        num_gpus: the number that the user asked for. None: all of this machine, or 0 if
            ``MODEL.DEVICE`` is not "cuda".
        eval_only: do not check ``SOLVER.AMP``.
    """
    available = torch.cuda.device_count()
    if num_gpus is None:
        num_gpus = available if cfg.MODEL.DEVICE.startswith("cuda") else 0
    if num_gpus < 0:
        raise ConfigError(f"--num-gpus {num_gpus}: ask for 0 (the CPU) or more")
    if num_gpus > available:
        raise ConfigError(
            f"--num-gpus {num_gpus}: this machine has {available}; ask for at most that, or leave "
            "--num-gpus out to use all" + ("" if available else " (here: the CPU)")
        )
    if num_gpus > 0 and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ConfigError(
            f"--num-gpus {num_gpus} with MODEL.DEVICE {cfg.MODEL.DEVICE}: leave one of them out"
        )
    if num_gpus == 0 and cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.MODEL.DEVICE = "cpu"
    check_precision(cfg, eval_only)
    if cfg.MODEL.COMPILE:
        check_compiler(torch.device(cfg.MODEL.DEVICE).type)
    return num_gpus


def check_precision(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check ``TEST.PRECISION`` and, for a training, ``SOLVER.AMP.PRECISION`` on this device."""
    precisions = {"TEST.PRECISION": cfg.TEST.PRECISION}
    if cfg.SOLVER.AMP.ENABLED and not eval_only:
        precisions["SOLVER.AMP.PRECISION"] = cfg.SOLVER.AMP.PRECISION
    for key, name in precisions.items():
        check_choice(key, name, KEYS[key].choices)
        # float16 works on the CPU, but it is slower than float32 there.
        if name == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
            raise ConfigError(f"{key} float16 needs a GPU: set {key} bfloat16")


def check_compiler(device_type: str) -> None:
    """Check that ``torch.compile`` has a C++ compiler ("cpu") or Triton ("cuda")."""
    if device_type == "cpu":
        # The compiler that PyTorch looks for.
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(name) is None:
            raise ConfigError(
                f"MODEL.COMPILE needs a C++ compiler, and there is no {name}: install one, name it "
                "in the environment variable CXX, or set MODEL.COMPILE False"
            )
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError("MODEL.COMPILE needs Triton: install triton, or set MODEL.COMPILE False")


def check_batch_size(cfg: CfgNode, world_size: int) -> None:
    """``SOLVER.IMS_PER_BATCH`` can be divided by the processes and their ``SOLVER.ACCUMULATE``."""
    batch, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    parts = world_size * passes
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        of_passes = f" of SOLVER.ACCUMULATE {passes} passes" if passes > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be split over {world_size} "
            f"process{'es' if world_size > 1 else ''}{of_passes}: set it to "
            f"{nearest} and SOLVER.BASE_LR to {cfg.SOLVER.BASE_LR * nearest / batch:g}"
        )


def check_weights(cfg: CfgNode) -> None:
    """``MODEL.WEIGHTS`` is a file, or a URL, which is downloaded to the cache here."""
    path = cfg.MODEL.WEIGHTS
    if not path:
        return
    url = path.replace("detectron2://", Detectron2Handler.S3_DETECTRON2_PREFIX)
    try:
        local = download(path)
    except Exception as error:  # a download can fail in many ways, and the fix is always the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        cache = os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache"))
        raise ConfigError(
            f"MODEL.WEIGHTS: cannot download {url} ({reason}): download it by hand and set "
            "MODEL.WEIGHTS to the file, or set it to '' to train from scratch "
            f"(downloads are kept in {cache}; the environment variable FVCORE_CACHE changes that)"
        ) from None
    if not os.path.isfile(local):
        raise ConfigError(f"MODEL.WEIGHTS: no file {local}")
