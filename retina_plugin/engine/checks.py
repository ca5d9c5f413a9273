"""What can be found wrong with a config before anything is built."""

from __future__ import annotations

import logging
import os

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import Detectron2Handler, PathManager

from retina_plugin.data.checks import check_datasets, check_num_classes
from retina_plugin.errors import ConfigError
from retina_plugin.losses import check_backend

from .precision import inference_dtype, training_dtype
from .speed import check_compiler

__all__ = ["check_config", "check_devices", "check_weights"]

logger = logging.getLogger("retina_plugin")

# What to set instead of a key of MODEL.ROI_HEADS, none of which RetinaNet reads.
_ROI_HEADS_TWINS = {
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


def check_config(cfg: CfgNode, eval_only: bool = False) -> None:
    """What can be found wrong before a model is built; also writes the embedded dataset.

    ``MODEL.ROI_HEADS`` keys, which have no effect, are logged as warnings.

    Raises:
        ConfigError: the first thing that can't work, with the key and the fix.
    """
    if not eval_only and cfg.SOLVER.IMS_PER_BATCH < 1:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH must be at least 1, got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    if not eval_only:
        _check_training_options(cfg)
    check_datasets(cfg, ("TEST",) if eval_only else ("TRAIN", "TEST"))
    check_num_classes(cfg)
    _check_p6_source(cfg)
    _warn_roi_heads(cfg)


def check_devices(cfg: CfgNode, num_gpus: int | None, eval_only: bool = False) -> int:
    """The number of GPUs to use; with none, ``cfg.MODEL.DEVICE`` "cuda" becomes "cpu".

    Args:
        num_gpus: what was asked for; None is all that are there, if ``MODEL.DEVICE`` wants one.
        eval_only: evaluation does not read ``SOLVER.AMP``.

    Raises:
        ConfigError: more GPUs than there are, or a setting that the device cannot do (float16 of
            a CPU, ``MODEL.COMPILE`` without a compiler).
    """
    available = torch.cuda.device_count()
    if num_gpus is None:
        num_gpus = available if cfg.MODEL.DEVICE.startswith("cuda") else 0
    if num_gpus < 0:
        raise ConfigError(f"--num-gpus {num_gpus}: ask for 0 (the CPU) or more")
    if num_gpus > available:
        raise ConfigError(
            f"--num-gpus {num_gpus}: this machine has {available}; ask for at most that, or leave "
            "--num-gpus out to use what is there" + ("" if available else " (the CPU)")
        )
    if num_gpus > 0 and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ConfigError(
            f"--num-gpus {num_gpus} with MODEL.DEVICE {cfg.MODEL.DEVICE}: leave one of them out"
        )
    if num_gpus == 0:
        if cfg.MODEL.DEVICE.startswith("cuda"):
            cfg.MODEL.DEVICE = "cpu"
        logger.info("No GPU is used: running on %s", cfg.MODEL.DEVICE)
    inference_dtype(cfg)
    if not eval_only:
        training_dtype(cfg)
    if cfg.MODEL.COMPILE:
        check_compiler(torch.device(cfg.MODEL.DEVICE).type)
    return num_gpus


def check_weights(cfg: CfgNode) -> None:
    """``MODEL.WEIGHTS`` can be read; a URL is downloaded to the cache here.

    Raises:
        ConfigError: the file or URL, the cache folder and the key.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        return
    url = path.replace("detectron2://", Detectron2Handler.S3_DETECTRON2_PREFIX)
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # whatever the download raises, the fix is the same
        cache = os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache"))
        raise ConfigError(
            f"MODEL.WEIGHTS: cannot download {url} ({_last_line(error)}): download it by hand and "
            f"set MODEL.WEIGHTS to the file, or set it to '' to train from scratch "
            f"(downloads are kept in {cache}, or where FVCORE_CACHE says)"
        ) from None
    if not os.path.isfile(local):
        raise ConfigError(f"MODEL.WEIGHTS: no file {local}")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _check_training_options(cfg: CfgNode) -> None:
    solver, retinanet = cfg.SOLVER, cfg.MODEL.RETINANET
    if solver.ACCUMULATE < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE must be at least 1, got {solver.ACCUMULATE}")
    check_backend(retinanet.LOSS_BACKEND)
    if retinanet.LOSS_IN_PLACE and retinanet.SAMPLER == "OHEM":
        raise ConfigError(
            "MODEL.RETINANET.LOSS_IN_PLACE has no effect with MODEL.RETINANET.SAMPLER OHEM, whose "
            "loss is that of a few anchors: set LOSS_IN_PLACE False"
        )
    if retinanet.LOSS_IN_PLACE and solver.AMP.ENABLED and solver.AMP.PRECISION == "float16":
        raise ConfigError(
            "MODEL.RETINANET.LOSS_IN_PLACE writes gradients that are not scaled yet, which "
            "SOLVER.AMP.PRECISION float16 cannot hold: set it to bfloat16, or LOSS_IN_PLACE False"
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
            twin = _ROI_HEADS_TWINS.get(name)
            logger.warning(
                "MODEL.ROI_HEADS.%s is set to %s, but RetinaNet does not read it%s",
                name,
                value,
                f": use {twin}" if twin else "",
            )
