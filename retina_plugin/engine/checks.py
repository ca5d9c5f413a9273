"""The quick checks of :mod:`retina_plugin.doctor`, in order, before anything is built.

Each raises a :class:`ConfigError`, which is one line with the key or file and what to do. Warnings
are logged.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from retina_plugin.doctor import Severity, config, datasets, machine, raise_errors, weights
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer

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


def check_run(
    cfg: CfgNode, num_gpus: int | None, *, eval_only: bool = False, resume: bool = False
) -> int:
    """All checks of a training or an evaluation that need no model and no pixels.

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
    if not eval_only:
        raise_errors(machine.check_tracking(cfg))
    if not (resume and Checkpointer(nn.Module(), cfg.OUTPUT_DIR).has_checkpoint()):
        if eval_only and not cfg.MODEL.WEIGHTS:
            raise ConfigError("--eval-only: set MODEL.WEIGHTS to the checkpoint to evaluate")
        check_weights(cfg)
    return num_gpus


def check_config(cfg: CfgNode, eval_only: bool = False) -> None:
    """Impossible values, keys that contradict each other, and the datasets with their annotations.

    Reads each annotation file once, and no image. What is found is in the findings of
    :func:`retina_plugin.doctor.quick_checks`; keys without an effect give a warning.
    """
    raise_errors(config.check_config(cfg, eval_only))
    check_datasets(cfg, ("TEST",) if eval_only else ("TRAIN", "TEST"))


def check_datasets(cfg: CfgNode, splits: tuple[str, ...] = ("TRAIN", "TEST")) -> None:
    """The datasets of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` are there and can be right.

    Writes the embedded dataset if it is named and not there yet.
    """
    found = datasets.check_datasets(cfg, splits)
    # Notes are for `retina doctor`.
    raise_errors(finding for finding in found if finding.severity is not Severity.NOTE)


def check_num_classes(cfg: CfgNode, splits: tuple[str, ...] = ("TRAIN", "TEST")) -> None:
    """``MODEL.RETINANET.NUM_CLASSES`` is the number of classes of every dataset of ``splits``.

    A dataset whose classes are not known passes. Some know them only once they are loaded.
    """
    raise_errors(datasets.check_num_classes(cfg, splits))


def check_devices(cfg: CfgNode, num_gpus: int | None, eval_only: bool = False) -> int:
    """The number of GPUs to use. If it is 0, ``cfg.MODEL.DEVICE`` "cuda" becomes "cpu".

    Also checks what the config asks of the device: the precision, and a compiler for
    ``MODEL.COMPILE``.

    Args:
        num_gpus: the number that the user asked for. None: all of this machine, or 0 if
            ``MODEL.DEVICE`` is not "cuda".
        eval_only: do not check ``SOLVER.AMP``.
    """
    raise_errors(machine.check_num_gpus(cfg, num_gpus))
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if num_gpus is None:
        num_gpus = torch.cuda.device_count() if on_gpu else 0
    if num_gpus == 0 and on_gpu:
        cfg.MODEL.DEVICE = "cpu"
    check_precision(cfg, eval_only)
    if cfg.MODEL.COMPILE:
        check_compiler(torch.device(cfg.MODEL.DEVICE).type)
    return num_gpus


def check_precision(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check ``TEST.PRECISION`` and, for a training, ``SOLVER.AMP.PRECISION`` on this device."""
    raise_errors(machine.check_precision(cfg, eval_only))


def check_compiler(device_type: str) -> None:
    """Check that ``torch.compile`` has a C++ compiler ("cpu") or Triton ("cuda")."""
    raise_errors(machine.check_compiler(device_type))


def check_batch_size(cfg: CfgNode, world_size: int) -> None:
    """``SOLVER.IMS_PER_BATCH`` can be divided by the processes and their ``SOLVER.ACCUMULATE``."""
    raise_errors(machine.check_batch_size(cfg, world_size))


def check_weights(cfg: CfgNode) -> None:
    """``MODEL.WEIGHTS`` is a file, or a URL, which is downloaded to the cache here."""
    raise_errors(weights.check_weights(cfg))
