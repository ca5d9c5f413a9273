"""From the command line to a checked config."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import Detectron2Handler, PathManager

from retina_plugin.config import add_retina_config, flatten
from retina_plugin.data.checks import check_datasets, check_num_classes
from retina_plugin.errors import ConfigError

__all__ = [
    "argument_parser",
    "check_config",
    "check_devices",
    "check_weights",
    "import_user_modules",
    "setup_cfg",
]

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


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line, but ``--num-gpus`` defaults to all that are there."""
    parser = default_argument_parser()
    parser.set_defaults(num_gpus=None)
    for action in parser._actions:
        if action.dest == "num_gpus":
            action.help = "number of GPUs per machine (default: all; 0: train on the CPU)"
        if action.dest == "config_file":
            action.required = True
    return parser


def setup_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """Defaults, the file with its ``_BASE_``, ``KEY VALUE`` pairs; then ``IMPORTS``. Not frozen.

    ``OUTPUT_DIR``, where neither the file nor ``opts`` sets it, is ``output/<the file's name>``.

    Raises:
        ConfigError: no such file, a file that is no YAML, or a key that does not exist (with the
            nearest ones).
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"--config-file: no file {config_file}")
    cfg = add_retina_config(get_cfg())
    default_output_dir = cfg.OUTPUT_DIR
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts or []))
    except (KeyError, AssertionError, ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(_explain(error, cfg, config_file)) from None
    except (TypeError, AttributeError):  # what fvcore stumbles over: nothing, or a list
        raise ConfigError(f"{config_file} or one of its bases is no mapping of keys") from None
    if default_output_dir == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.join("output", Path(config_file).stem)
    import_user_modules(cfg)
    return cfg


def _explain(error: Exception, cfg: CfgNode, config_file: str) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split())  # YAML's errors have several lines
    key = text.rsplit(": ", 1)[-1] if text.startswith("Non-existent") else ""
    near = difflib.get_close_matches(key, list(flatten(cfg)), n=3) if key else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{config_file} or the overrides: {text}{hint}"


def import_user_modules(cfg: CfgNode) -> None:
    """Import what ``IMPORTS`` names, once a process.

    Raises:
        ConfigError: a file or module that is not there, or a file named like another module. What
            a file itself raises is not caught.
    """
    for name in cfg.IMPORTS:
        if not name.endswith(".py"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if not f"{name}.".startswith(f"{error.name}."):
                    raise  # the module is there, something that it imports is not
                raise ConfigError(
                    f"IMPORTS: no module '{name}' is installed or on PYTHONPATH"
                ) from None
            continue
        path = os.path.abspath(name)
        if not os.path.isfile(path):
            raise ConfigError(f"IMPORTS: no file {path}")
        module_name = Path(path).stem
        if module_name in sys.modules:
            if getattr(sys.modules[module_name], "__file__", None) == path:
                continue
            raise ConfigError(f"IMPORTS: {name} would hide the module '{module_name}': rename it")
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # it is a file that ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that its classes can be pickled
        spec.loader.exec_module(module)


def check_config(cfg: CfgNode, eval_only: bool = False) -> None:
    """What can be found wrong before a model is built; also writes the embedded dataset.

    Warnings are logged: an unlikely learning rate, and ``MODEL.ROI_HEADS`` keys without effect.

    Raises:
        ConfigError: the first thing that can't work, with the key and the fix.
    """
    if not eval_only and cfg.SOLVER.IMS_PER_BATCH < 1:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH must be at least 1, got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    check_datasets(cfg, ("TEST",) if eval_only else ("TRAIN", "TEST"))
    check_num_classes(cfg)
    _check_p6_source(cfg)
    _warn_roi_heads(cfg)
    if not eval_only:
        _warn_learning_rate(cfg)


def check_devices(cfg: CfgNode, num_gpus: int | None, eval_only: bool = False) -> int:
    """The number of GPUs to use; with none, ``cfg.MODEL.DEVICE`` "cuda" becomes "cpu".

    Args:
        num_gpus: what was asked for; None is all that are there, if ``MODEL.DEVICE`` wants one.
        eval_only: evaluation does not read ``SOLVER.AMP``.

    Raises:
        ConfigError: more GPUs than there are, or a setting that needs one where there is none.
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
        if cfg.SOLVER.AMP.ENABLED and not eval_only:
            raise ConfigError("SOLVER.AMP.ENABLED needs a GPU: set SOLVER.AMP.ENABLED False")
        logger.info("No GPU is used: running on %s", cfg.MODEL.DEVICE)
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


def _warn_learning_rate(cfg: CfgNode) -> None:
    per_image, batch = cfg.SOLVER.LR_PER_IMAGE, cfg.SOLVER.IMS_PER_BATCH
    expected = per_image * batch
    # within a factor of 1.5 it is a choice; half or twice is most often a forgotten batch size
    if per_image and not 1 / 1.5 <= cfg.SOLVER.BASE_LR / expected <= 1.5:
        logger.warning(
            "SOLVER.BASE_LR %g is for another batch size than SOLVER.IMS_PER_BATCH %d: linear "
            "scaling gives SOLVER.BASE_LR %.4g (SOLVER.LR_PER_IMAGE %g; 0.0 turns this off)",
            cfg.SOLVER.BASE_LR,
            batch,
            expected,
            per_image,
        )
