"""What an exported file says of itself, so that it can be used without its config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from retina_plugin import __version__
from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.errors import ConfigError

__all__ = ["METADATA_KEY", "Metadata", "describe_model", "resampler_of"]

# Of ONNX's custom metadata, of OpenVINO's rt_info and, with ".json", of a pt2 file's extra files.
METADATA_KEY = "retina_plugin"

_VERSION = 1

_RESAMPLERS = {"FastMapper": "torch", "DatasetMapper": "pillow"}


@dataclass(frozen=True)
class Metadata:
    """Input, output and origin of an exported model.

    Attributes:
        stage: "nms", "boxes" or "head", see :meth:`.DenseModel.forward`.
        format: the channel order of the input, "BGR" or "RGB".
        min_size, max_size: images are resized so that the short side has ``min_size`` pixels, and
            the long side ``max_size`` at most; 0: they are not resized.
        resize: "detectron2" or "torchvision", see ``INPUT.RESIZE``.
        resampler: what resizes with "detectron2": "torch" (``FastMapper``) or "pillow"
            (``DatasetMapper``). Their pixels differ by 1 or 2 here and there, and so do scores.
            "custom": another ``INPUT.MAPPER`` prepares images in a way that only it knows.
        boxes_outside: "drop", "keep" or "clip", see ``MODEL.RETINANET.BOXES_OUTSIDE_TEST``.
        class_names: of the K classes.
        category_ids: the dataset's ids of the classes; None: not known.
        score_thresh, nms_thresh, topk_candidates, max_detections: see :class:`.DenseInference`.
        divisibility: the file pads the sides of an image to multiples of it.
        config_digest: SHA-256 of all that the config says of the model and its input.
        weights_digest: SHA-256 of the tensors' names and values, in whatever format they were.
        quantized: "", "fp16" or "int8".
        made_by: versions of this package and of PyTorch.
        version: of this record.
    """

    stage: str
    format: str
    min_size: int
    max_size: int
    resize: str
    resampler: str
    boxes_outside: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    score_thresh: float
    nms_thresh: float
    topk_candidates: int
    max_detections: int
    divisibility: int
    config_digest: str
    weights_digest: str
    quantized: str = ""
    made_by: str = ""
    version: int = _VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, path: str = "the file") -> Metadata:
        """The record of a file.

        Args:
            text: of :meth:`to_json`.
            path: of the file, for the message.

        Raises:
            ConfigError: it is no such record, or one of a later version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version == _VERSION:
                known = {field.name for field in fields(cls)}
                for key in ("class_names", "category_ids"):
                    content[key] = None if content[key] is None else tuple(content[key])
                return cls(**{k: v for k, v in content.items() if k in known})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: its metadata cannot be read: {error}") from None
        raise ConfigError(
            f"{path} was exported by a later version of retina_plugin (its metadata has version "
            f"{version}, this one reads {_VERSION}): upgrade it, or export again"
        )


def describe_model(
    cfg: CfgNode,
    state: Mapping[str, Tensor],
    *,
    stage: str,
    class_names: Sequence[str],
    category_ids: Sequence[int] | None,
    divisibility: int,
) -> Metadata:
    """The metadata of a config's model.

    Args:
        state: the model's ``state_dict()``.
        stage, class_names, category_ids, divisibility: see :class:`Metadata`.
    """
    retinanet = cfg.MODEL.RETINANET
    return Metadata(
        stage=stage,
        format=cfg.INPUT.FORMAT,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        resize=cfg.INPUT.RESIZE,
        resampler=resampler_of(cfg),
        boxes_outside=retinanet.BOXES_OUTSIDE_TEST,
        class_names=tuple(class_names),
        category_ids=None if category_ids is None else tuple(category_ids),
        score_thresh=retinanet.SCORE_THRESH_TEST,
        nms_thresh=retinanet.NMS_THRESH_TEST,
        topk_candidates=retinanet.TOPK_CANDIDATES_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        divisibility=divisibility,
        config_digest=config_digest(cfg),
        weights_digest=weights_digest(state),
        made_by=f"retina_plugin {__version__}, torch {torch.__version__}",
    )


def resampler_of(cfg: CfgNode) -> str:
    """What resizes the images of a config, see :class:`Metadata`.

    A mapper of the user's that differs in training only prepares noise as one of ours does.
    """
    name = cfg.INPUT.MAPPER
    if name in _RESAMPLERS:
        return _RESAMPLERS[name]
    theirs = _prepared_noise(cfg, name)
    for mapper, resampler in _RESAMPLERS.items():
        ours = _prepared_noise(cfg, mapper)
        if theirs is not None and ours is not None and torch.equal(theirs, ours):
            return resampler
    return "custom"


def _prepared_noise(cfg: CfgNode, mapper: str) -> Tensor | None:
    """What a mapper makes of noise; None if it prepares no images without a record."""
    prepare = getattr(
        DATASET_MAPPER_REGISTRY.build_named(mapper, cfg, False), "prepare_image", None
    )
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    return None if prepare is None else prepare(noise).float()


def config_digest(cfg: CfgNode) -> str:
    """SHA-256 of what decides the detections of given weights, not of how a machine computes them.

    That is all of ``MODEL`` and ``INPUT`` but the training's part, and ``DETECTIONS_PER_IMAGE``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("WEIGHTS", "DEVICE", "COMPILE", "CHANNELS_LAST", "ACTIVATION_CHECKPOINTING"):
        cfg.MODEL.pop(key, None)
    inputs = {
        key: cfg.INPUT[key]
        for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST", "RESIZE", "MAPPER")
    }
    relevant = [_plain(cfg.MODEL), inputs, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.MERGE]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(node: Any) -> Any:
    return {k: _plain(v) for k, v in node.items()} if isinstance(node, dict) else node
