"""Weights for the small model of the embedded digits: ``MODEL.WEIGHTS: digits://backbone.pkl``.

The paper fine-tunes backbones that were trained to classify ImageNet (section 4.1,
"Optimization"). The same in small: ResNet-18 of half width learns to tell the digits of the
training scenes apart, one to a crop; no box, anchor or loss of the paper is involved. The weights
are written at first use and kept.
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
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathHandler, PathManager
from torch import Tensor, nn

from retina_plugin.cache import atomic_write, cache_root
from retina_plugin.config import add_retina_config
from retina_plugin.data import digits
from retina_plugin.modeling.backbone import build_retina_fpn_backbone

__all__ = ["pretrain_backbone"]

logger = logging.getLogger("retina_plugin")

_SIDE = 64  # of a crop, in pixels
_ITERATIONS, _BATCH, _LEARNING_RATE = 400, 64, 0.1
_VERSION = 1  # of everything below: raise it whenever the weights change


def pretrain_backbone(path: Path, iterations: int = _ITERATIONS) -> float:
    """Train the backbone of ``configs/_base_/digits_R18.yaml`` to classify; write a checkpoint.

    Args:
        path: of the file, in the format of Detectron2's model zoo; it appears whole or not at all.
        iterations: of SGD with momentum .9 and a one-cycle schedule.

    Returns:
        The mean cross entropy of the last tenth of the iterations.
    """
    crops_N, labels_N = _crops(DatasetCatalog.get("digits_scenes_train"))
    logger.info("Training a backbone to classify %d crops, once, for %s", len(crops_N), path)
    cfg = _model_cfg()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, _PIXEL_STD))
    losses = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)  # the same weights for every training that starts from them
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


_PIXEL_STD = [57.375, 57.120, 58.395]  # that of the config that the weights are for


def _model_cfg() -> Any:
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM = 18, "BN"
    resnets.STEM_OUT_CHANNELS = resnets.RES2_OUT_CHANNELS = 32
    resnets.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    return cfg


def _crops(records: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(N, 3, 64, 64) uint8 BGR around each object, not quite centred, and (N,) classes."""
    rng = np.random.default_rng(0)
    crops, labels = [], []
    for record in records:
        image = cv2.imread(record["file_name"])
        assert image is not None  # this package has written it
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
        "matching_heuristics": False,  # names are the detector's own
    }
    with atomic_write(path) as part:
        part.write_bytes(pickle.dumps(checkpoint))
        part.chmod(0o644)  # whatever the umask: the cache may be shared


class _DigitsHandler(PathHandler):
    """digits://backbone.pkl is a file of the cache."""

    PREFIX = "digits://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        if path != f"{self.PREFIX}backbone.pkl":
            raise FileNotFoundError(f"{path}: there is {self.PREFIX}backbone.pkl only")
        made_of = [_VERSION, digits.SPEC.digest, _SIDE, _ITERATIONS, _BATCH, _LEARNING_RATE]
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
        local = cache_root() / f"digits_backbone-{digest}.pkl"
        if not local.is_file():
            pretrain_backbone(local)
        return str(local)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(_DigitsHandler())
