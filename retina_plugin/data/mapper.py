"""Mappers from a dataset's record to a model's input, chosen by ``INPUT.MAPPER``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper as Detectron2DatasetMapper
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from retina_plugin.data.annotations import check_annotations
from retina_plugin.data.images import (
    BadImageError,
    FastResize,
    check_format,
    check_image_size,
    check_readable,
    image_to_tensor,
    read_image,
)
from retina_plugin.errors import ConfigError
from retina_plugin.registry import ComponentRegistry

__all__ = ["DATASET_MAPPER_REGISTRY", "DatasetMapper", "FastMapper"]

# Entries are callables from record to record, with from_config(cfg, is_train).
DATASET_MAPPER_REGISTRY = ComponentRegistry("INPUT.MAPPER")

# Keys of MODEL that ask for data which Detectron2's mapper reads and FastMapper cannot.
_UNSUPPORTED = ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS")

logger = logging.getLogger("retina_plugin")


Record = dict[str, Any]


class _BadImages:
    """What a mapper does with images that cannot be used: ``DATALOADER.ON_BAD_IMAGE``.

    An evaluation always stops: its numbers must not come from fewer images.
    """

    def __init__(self, is_train: bool, on_bad_image: str) -> None:
        self._skip = is_train and on_bad_image == "skip"
        self._warned: set[str] = set()

    def read(self, read: Callable[[Record], Record], record: Record) -> Record | None:
        """``read(record)``; None if its image is bad and bad ones are skipped, with a warning."""
        try:
            return read(record)
        except BadImageError as error:
            if not self._skip:
                raise
            if record["file_name"] not in self._warned:
                self._warned.add(record["file_name"])
                count = len(self._warned)
                logger.warning("Skipped, the %s of this process: %s", f"{count}.", error)
            return None


@DATASET_MAPPER_REGISTRY.register()
class DatasetMapper(Detectron2DatasetMapper):
    """Detectron2's mapper. It uses Pillow, reads masks and keypoints, drops crowds.

    The records are Detectron2's. What it would fail on, or read wrongly, is one clear error.

    Args:
        is_train, arguments: Detectron2's.
        on_bad_image: "error" or "skip", see ``DATALOADER.ON_BAD_IMAGE``.
    """

    @configurable
    def __init__(self, is_train: bool, *, on_bad_image: str = "error", **arguments: Any) -> None:
        super().__init__(is_train, **arguments)
        self._bad_images = _BadImages(is_train, on_bad_image)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Detectron2's arguments.

        Raises:
            ConfigError: ``IGNORE_IOF_THRESH`` is set, but this mapper drops crowd boxes; or
                ``INPUT.FORMAT`` is unknown.
        """
        check_format(cfg.INPUT.FORMAT)
        if is_train and cfg.MODEL.RETINANET.IGNORE_IOF_THRESH is not None:
            raise ConfigError(
                "MODEL.RETINANET.IGNORE_IOF_THRESH needs crowd boxes, which INPUT.MAPPER "
                "DatasetMapper drops: set INPUT.MAPPER FastMapper, or IGNORE_IOF_THRESH None"
            )
        arguments = super().from_config(cfg, is_train)
        return {**arguments, "on_bad_image": cfg.DATALOADER.ON_BAD_IMAGE}

    def __call__(self, dataset_dict: Record) -> Record | None:
        """Detectron2's record. None: its image is bad, and bad images are skipped.

        Raises:
            BadImageError: the image cannot be used.
            ConfigError: an annotation cannot be used; the line has the file and the annotation.
        """
        return self._bad_images.read(self._read, dataset_dict)

    def prepare_image(self, image: np.ndarray) -> torch.Tensor:
        """The augmented image of a file that has no record: see :meth:`FastMapper.prepare_image`.

        Pillow resizes it, as in Detectron2.
        """
        augmented = T.AugInput(image)
        self.augmentations(augmented)
        return image_to_tensor(augmented.image)

    def _read(self, dataset_dict: Record) -> Record:
        file_name = dataset_dict["file_name"]
        check_readable(file_name, self.image_format)
        if self.is_train:
            check_annotations(file_name, _without_crowds(dataset_dict.get("annotations", [])))
        try:
            record = super().__call__(dataset_dict)
        except detection_utils.SizeMismatchError as error:
            raise BadImageError(f"{file_name}: {error}") from None
        except (OSError, SyntaxError) as error:  # Pillow's, while it decodes
            raise BadImageError(f"cannot read the image {file_name} ({error})") from error
        if record["image"].dtype == torch.float64:  # YUV-BT.601: float32 is the weights' precision
            record["image"] = record["image"].float()
        return record


@DATASET_MAPPER_REGISTRY.register()
class FastMapper:
    """Detectron2's mapper for boxes, in a third of the time.

    The augmentations are Detectron2's own: the same seed gives the same sizes, crops and flips, and
    boxes are equal to the bit. Pixels are computed in two other ways. OpenCV decodes JPEGs
    (:func:`read_image`: equal pixels), and torch resizes images (:class:`FastResize`: almost all
    pixels are equal, the others differ by 1 or 2 of 255).

    Peer: ``detectron2.data.DatasetMapper``.

    Args:
        is_train: whether records get ``instances``; in inference annotations are dropped.
        augmentations: Detectron2's augmentations or transforms, in this order.
        image_format: format of the returned image in Detectron2's terms: "BGR", "RGB", ...
        keep_crowd: keep crowd boxes and mark them in ``instances.gt_iscrowd`` (bool, one a box),
            so that the detector can ignore anchors in them. False drops crowd boxes.
        on_bad_image: "error" or "skip", see ``DATALOADER.ON_BAD_IMAGE``.

    Example::

        mapper = FastMapper(**FastMapper.from_config(cfg, is_train=True))
        loader = build_detection_train_loader(cfg, mapper=mapper)
    """

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        keep_crowd: bool = False,
        on_bad_image: str = "error",
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.keep_crowd = keep_crowd
        self._bad_images = _BadImages(is_train, on_bad_image)
        mode = "training" if is_train else "inference"
        logger.debug("Augmentations in %s: %s", mode, list(augmentations))

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Augmentations and format of ``cfg.INPUT``, as Detectron2 reads them.

        Raises:
            ConfigError: the config asks for masks, keypoints or proposals, or ``INPUT.FORMAT`` is
                unknown.
        """
        check_format(cfg.INPUT.FORMAT)
        for key in _UNSUPPORTED:
            if cfg.MODEL[key]:
                raise ConfigError(
                    f"MODEL.{key}: INPUT.MAPPER FastMapper reads boxes only; "
                    "set INPUT.MAPPER DatasetMapper"
                )
        arguments = Detectron2DatasetMapper.from_config(cfg, is_train)
        return {
            "is_train": is_train,
            "augmentations": arguments["augmentations"],
            "image_format": arguments["image_format"],
            "keep_crowd": cfg.MODEL.RETINANET.IGNORE_IOF_THRESH is not None,
            "on_bad_image": cfg.DATALOADER.ON_BAD_IMAGE,
        }

    def __call__(self, dataset_dict: Record) -> Record | None:
        """A new record with ``image`` (C, H, W) and, in training, ``instances`` in its frame.

        It shares no memory with ``dataset_dict``, which is not changed. None: the image is bad, and
        bad images are skipped.

        Raises:
            BadImageError: the image is missing, cannot be read, or has not the record's size.
            ConfigError: an annotation cannot be used; the line has the file and the annotation.
        """
        return self._bad_images.read(self._read, dataset_dict)

    def prepare_image(self, image: np.ndarray) -> torch.Tensor:
        """The augmented image as the model takes it.

            tensor = mapper.prepare_image(read_image("street.jpg", mapper.image_format))

        Args:
            image: (H, W, C) in ``image_format``.

        Returns:
            (C, H', W'), of the same type; float32 for YUV-BT.601.
        """
        return self._augment(image)[0]

    def _augment(
        self, image: np.ndarray, sem_seg: np.ndarray | None = None
    ) -> tuple[torch.Tensor, np.ndarray | None, T.TransformList]:
        augmented = _AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        return image_to_tensor(augmented.image), augmented.sem_seg, transforms

    def _read(self, dataset_dict: Record) -> Record:
        # Not copied: a deep copy of polygons takes longer than everything done with the boxes.
        annotations = dataset_dict.get("annotations")
        record = copy.deepcopy({k: v for k, v in dataset_dict.items() if k != "annotations"})
        image = read_image(record["file_name"], self.image_format)
        check_image_size(record, image)
        sem_seg = None
        if "sem_seg_file_name" in record:
            sem_seg = detection_utils.read_image(record.pop("sem_seg_file_name"), "L").squeeze(2)

        record["image"], sem_seg, transforms = self._augment(image, sem_seg)
        if sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(sem_seg.astype("long"))
        if self.is_train and annotations is not None:
            size = tuple(record["image"].shape[1:])
            if not self.keep_crowd:
                annotations = _without_crowds(annotations)
            check_annotations(record["file_name"], annotations)
            record["instances"] = self._instances(annotations, transforms, size)
        return record

    def _instances(
        self, annotations: list[Record], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        instances = Instances(size)
        instances.gt_boxes = Boxes(_transform_boxes(annotations, transforms, size))
        classes = [int(a["category_id"]) for a in annotations]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if self.keep_crowd:
            crowd = [a.get("iscrowd", 0) != 0 for a in annotations]
            instances.gt_iscrowd = torch.tensor(crowd, dtype=torch.bool)
        return detection_utils.filter_empty_instances(instances)


def _without_crowds(annotations: list[Record]) -> list[Record]:
    return [a for a in annotations if a.get("iscrowd", 0) == 0]


def _transform_boxes(
    annotations: list[Record], transforms: T.TransformList, size: tuple[int, int]
) -> np.ndarray:
    """(N, 4) boxes XYXY after the transforms, clipped to an image of ``size`` (height, width).

    Equal to Detectron2's ``transform_instance_annotations`` of each box, to the bit: corners are
    computed in float32, everything else in float64.
    """
    boxes = [a["bbox"] for a in annotations]
    modes = {a["bbox_mode"] for a in annotations}
    # Detectron2 transforms a box of integers in integers, and an array in its own precision
    is_float = all(type(box) is list and float in map(type, box) for box in boxes)
    if not is_float or modes != {BoxMode.XYWH_ABS}:
        one_by_one = [
            detection_utils.transform_instance_annotations(
                {"bbox": a["bbox"], "bbox_mode": a["bbox_mode"]}, transforms, size
            )["bbox"]
            for a in annotations
        ]
        return np.array(one_by_one).reshape(-1, 4)
    corners = np.array(boxes, dtype=np.float32)
    corners[:, 2:] += corners[:, :2]
    moved = transforms.apply_box(corners.astype(np.float64))
    return np.minimum(moved.clip(min=0), [*size[::-1], *size[::-1]])


class _AugInput(T.AugInput):
    """Detectron2's ``AugInput``, which resizes with :class:`FastResize`."""

    def transform(self, tfm: T.Transform) -> None:
        if type(tfm) is T.ResizeTransform:  # not a subclass, which may override it
            tfm = FastResize(tfm.h, tfm.w, tfm.new_h, tfm.new_w, tfm.interp)
        super().transform(tfm)
