"""Pretrained weights for the embedded digits: ``MODEL.WEIGHTS: digits://backbone.pkl``.

The paper starts from backbones that were trained to classify ImageNet (section 4.1,
"Initialization"). Here, the half-width ResNet-18 of ``configs/_base_/digits_R18.yaml`` is trained
to classify crops of the training scenes, one digit each, with a softmax cross entropy. The weights
are written to the cache at first use.

Importing this module registers the path, so a config names it in ``IMPORTS``.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathHandler, PathManager
from torch import Tensor, nn

from retina_plugin.cache import atomic_write, cache_root
from retina_plugin.data import digits
from retina_plugin.engine import setup_cfg
from retina_plugin.modeling.backbone import build_retina_fpn_backbone

__all__ = ["pretrain_backbone"]

logger = logging.getLogger("retina_plugin")

_DATASETS = ("digits_scenes_train", "digits_sparse_train")
_SIDE = 64  # of a crop (pixels)
_ITERATIONS, _BATCH, _LEARNING_RATE = 1000, 64, 0.1
_VERSION = 2  # raise it whenever a change to this file changes the weights


def pretrain_backbone(path: Path, iterations: int = _ITERATIONS) -> float:
    """Train the backbone of ``configs/_base_/digits_R18.yaml`` to classify, and write a checkpoint.

    Args:
        path: file to write, in the format of Detectron2's model zoo.
        iterations: steps of SGD with momentum .9 and a one-cycle schedule.

    Returns:
        The mean cross entropy of the last tenth of the iterations.
    """
    records = [record for name in _DATASETS for record in DatasetCatalog.get(name)]
    crops_N, labels_N = _crops(records)
    logger.info("Training a backbone to classify %d crops, once, for %s", len(crops_N), path)
    cfg = _model_cfg()
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    losses = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)  # all trainings start from the same weights
        backbone = build_retina_fpn_backbone(cfg, ShapeSpec(channels=3)).bottom_up.train()
        classifier = nn.Linear(backbone.output_shape()["res5"].channels, len(digits.CLASSES))
        parameters = [*backbone.parameters(), *classifier.parameters()]
        optimizer = torch.optim.SGD(parameters, _LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=iterations
        )
        for _ in range(iterations):
            chosen = torch.randint(len(crops_N), (_BATCH,))
            features = backbone((crops_N[chosen].float() - mean) / std)["res5"].mean(dim=(2, 3))
            loss = F.cross_entropy(classifier(features), labels_N[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    _write(path, {f"backbone.bottom_up.{k}": v for k, v in backbone.state_dict().items()})
    return float(np.mean(losses[-max(1, iterations // 10) :]))


def _model_cfg() -> CfgNode:
    # Building the pyramid draws random numbers before the classifier does. Its own weights are not
    # kept, but another width would change the weights.
    pyramid = ["MODEL.FPN.OUT_CHANNELS", "256", "MODEL.FPN.NORM", ""]
    return setup_cfg("_base_/digits_R18.yaml", pyramid)


def _crops(records: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(N, 3, 64, 64) uint8 BGR crops around the objects, a little off centre; (N,) classes."""
    rng = np.random.default_rng(0)
    crops, labels = [], []
    for record in records:
        image = cv2.imread(record["file_name"])
        assert image is not None  # retina_plugin.data.digits wrote it
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            side = max(w, h) * rng.uniform(1.1, 1.6)
            left, top = np.array([x + w / 2, y + h / 2]) + (rng.uniform(-0.1, 0.1, 2) - 0.5) * side
            zoom = _SIDE / side
            to_crop = np.array([[zoom, 0, -left * zoom], [0, zoom, -top * zoom]], np.float64)
            crops.append(
                cv2.warpAffine(image, to_crop, (_SIDE, _SIDE), borderMode=cv2.BORDER_REFLECT)
            )
            labels.append(annotation["category_id"])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), torch.tensor(labels)


def _write(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint = {
        "model": {name: tensor.numpy() for name, tensor in state.items()},
        "__author__": "retina_plugin",
        "matching_heuristics": False,  # the names are those of the detector's state dict
    }
    with atomic_write(path) as part:
        part.write_bytes(pickle.dumps(checkpoint))
        part.chmod(0o644)  # readable for everybody who shares the cache


class _DigitsHandler(PathHandler):
    """Resolves digits://backbone.pkl to a file of the cache, and trains it if it is missing."""

    PREFIX = "digits://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        if path != f"{self.PREFIX}backbone.pkl":
            raise FileNotFoundError(f"{path}: the only file is {self.PREFIX}backbone.pkl")
        scenes = [digits.SPEC.digest, digits.SPARSE_SPEC.digest]
        made_of = [_VERSION, *scenes, _SIDE, _ITERATIONS, _BATCH, _LEARNING_RATE]
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
        local = cache_root() / f"digits_backbone-{digest}.pkl"
        if not local.is_file():
            pretrain_backbone(local)
        return str(local)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(_DigitsHandler())
