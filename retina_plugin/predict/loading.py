"""A model with its weights, and the names and ids of its classes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from retina_plugin.config import add_retina_config
from retina_plugin.data import register_datasets
from retina_plugin.doctor import config as config_checks
from retina_plugin.doctor import raise_errors
from retina_plugin.engine import check_devices, check_weights, prepare_model, setup_cfg
from retina_plugin.errors import ConfigError, first_line
from retina_plugin.weights import Checkpointer

__all__ = ["Classes", "load_model", "prediction_cfg"]

logger = logging.getLogger("retina_plugin")

# Names of the K classes, and the dataset's ids of them or None.
Classes = tuple[tuple[str, ...], tuple[int, ...] | None]

_NO_IDS = "category_id is the class's index from 0, because the dataset %s %s"


def prediction_cfg(
    config: str | os.PathLike | CfgNode,
    weights: str | os.PathLike = "",
    *,
    device: str | None = None,
    opts: Sequence[str] = (),
    score: float | None = None,
) -> CfgNode:
    """A checked config for prediction. Datasets need not be there.

    Args, Raises: see :meth:`.predictor.RetinaPredictor.load`.
    """
    if isinstance(config, CfgNode):
        cfg = config.clone()
        cfg.defrost()
        if "PRECISION" not in cfg.TEST:  # Detectron2's own
            cfg = add_retina_config(cfg)
        try:
            cfg.merge_from_list(list(opts))
        except (KeyError, AssertionError, ValueError) as error:
            raise ConfigError(f"opts: {' '.join(str(error).split())}") from None
        register_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    else:
        cfg = setup_cfg(os.fspath(config), list(opts))
    if os.fspath(weights):
        cfg.MODEL.WEIGHTS = os.path.expanduser(os.fspath(weights))
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("there are no weights: name a file or a URL, or set MODEL.WEIGHTS")
    if device is not None:
        _check_device(device)
        cfg.MODEL.DEVICE = device
    if score is not None and not 0 <= score <= 1:
        raise ConfigError(f"score {score}: give a probability from 0 to 1")
    if score is not None and score < cfg.MODEL.RETINANET.SCORE_THRESH_TEST:
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = score
    raise_errors(config_checks.check_config(cfg, eval_only=True))
    check_devices(cfg, None, eval_only=True)
    check_weights(cfg)
    return cfg


def _check_device(device: str) -> None:
    try:
        known = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device '{device}': give cpu, cuda or cuda:NUMBER") from None
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device '{device}': torch sees {count} GPUs here; cpu always works")
    if known.type == "meta":
        raise ConfigError("device 'meta' has shapes but no numbers; cpu always works")
    try:
        torch.empty(1, device=known)
    except Exception as error:  # RuntimeError, AssertionError, ...: as the device has it
        reason = first_line(error).partition(". ")[0]
        raise ConfigError(f"device '{device}' does not work ({reason}); cpu always does") from None


def load_model(cfg: CfgNode) -> tuple[nn.Module, Classes]:
    """The model in evaluation mode with all of its weights, and its classes.

    Class names are those of the checkpoint, else of the config's datasets, else numbers; the last
    two are said in a line, and so is that the config's datasets give no ids.

    Raises:
        ConfigError: the weights cannot be read, or do not fit the whole model.
    """
    model = build_model(cfg)
    prepare_model(model, channels_last=cfg.MODEL.CHANNELS_LAST, compile_parts=cfg.MODEL.COMPILE)
    checkpointer = Checkpointer(model)
    rest = checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    checkpointer.check_complete()
    model.eval()
    return model, _classes(cfg, rest.get("class_names"))


def _classes(cfg: CfgNode, in_checkpoint: Sequence[str] | None) -> Classes:
    number = cfg.MODEL.RETINANET.NUM_CLASSES
    if in_checkpoint is not None and len(in_checkpoint) != number:
        raise ConfigError(
            f"{cfg.MODEL.WEIGHTS} has {len(in_checkpoint)} class names, but MODEL.RETINANET."
            f"NUM_CLASSES is {number}: use the config that it was trained with"
        )
    no_ids = []
    for dataset in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        names, ids, problem = _of_dataset(dataset)
        if len(names) != number or (in_checkpoint is not None and tuple(in_checkpoint) != names):
            if not names and problem:
                no_ids.append((dataset, problem))
            continue
        if in_checkpoint is None:
            logger.info("%-11s of the dataset %s: the weights carry none", "Class names", dataset)
        if ids is None and problem:
            logger.warning(_NO_IDS, dataset, problem)
        return names, ids
    if in_checkpoint is not None:
        if no_ids:
            logger.warning(_NO_IDS, *no_ids[0])
        return tuple(map(str, in_checkpoint)), None
    logger.warning(
        "neither the weights nor the config's datasets have the names of %d classes: numbers stand "
        "for them",
        number,
    )
    return tuple(map(str, range(number))), None


def _of_dataset(dataset: str) -> tuple[tuple[str, ...], tuple[int, ...] | None, str]:
    """Names of its classes, their ids, and what is wrong with it."""
    if dataset not in DatasetCatalog:
        return (), None, "is not known here"
    problem = ""
    metadata = MetadataCatalog.get(dataset)
    file = metadata.get("json_file")
    mapping = metadata.get("thing_dataset_id_to_contiguous_id")
    if mapping is None and file is not None and os.path.isfile(file):
        # as Detectron2 does when it loads the dataset, which takes longer
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(file, "rb") as content:
                categories = sorted(json.load(content)["categories"], key=lambda x: x["id"])
            mapping = {category["id"]: k for k, category in enumerate(categories)}
            names = tuple(str(category["name"]) for category in categories)
            return names, tuple(mapping), ""
    if mapping is None and file is not None:
        problem = f"cannot be read at {os.path.abspath(file)}"
    if metadata.get("thing_classes") is None:
        try:
            DatasetCatalog.get(dataset)
            mapping, problem = metadata.get("thing_dataset_id_to_contiguous_id"), ""
        except Exception as error:  # the user's code; prediction needs no dataset
            logger.debug("dataset %s: %s", dataset, error)
            problem = problem or f"cannot be read ({first_line(error)})"
    names = tuple(metadata.get("thing_classes") or ())
    by_class = {k: category for category, k in (mapping or {}).items()}
    has_ids = len(names) > 0 and sorted(by_class) == list(range(len(names)))
    ids = tuple(by_class[k] for k in range(len(names))) if has_ids else None
    return names, ids, problem
