"""``RetinaPredictor``: a trained model that is called with images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.data.images import BadImageError
from retina_plugin.data.views import build_resizes
from retina_plugin.engine.performance import build_detector
from retina_plugin.errors import ConfigError

from .batches import grouped, padded_size, read_ahead
from .images import in_format, large_images, unresized
from .loading import load_model, prediction_cfg
from .predictions import Predictions, class_indices
from .sources import Frame, OnError, describe, is_video, list_folder, read_frames
from .tiles import Tile, check_tiles, merge_tiles, tile_grid
from .video import read_video

__all__ = ["RetinaPredictor"]

_READ_AHEAD = 2  # images that a thread has ready; they may be large


@dataclass(frozen=True, eq=False)
class _Prepared:
    frame: Frame
    tensor: Tensor  # (C, H', W'), the model's input


class RetinaPredictor:
    """Detects in images with a trained model.

        predictor = RetinaPredictor.load("retina_R50_800.yaml", "model_final.pth")
        found = predictor("street.jpg")  # a path, a BGR array or a PIL image
        several = predictor(["a.jpg", "b.jpg"])  # a list for a list
        for found in predictor("photos/"):  # an iterator for a folder or a video
            print(found.path, found.boxes, found.class_names)

    The detections of an image do not depend on the images that share its batch, except for the last
    digits that another batch size rounds differently.

    Args:
        model: the detector: list of {"image", "height", "width"} -> list of {"instances"}.
        prepare: (H, W, C) array in ``image_format`` -> (C, H', W') input of the model.
        image_format: ``INPUT.FORMAT``.
        names, category_ids, score, classes, batch_size, tile, overlap: see :meth:`load` and
            :class:`Predictions`.
        divisibility, square_size: the padding of a batch, see :func:`.batches.padded_size`.
    """

    def __init__(
        self,
        model: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
        prepare: Callable[[np.ndarray], Tensor],
        *,
        image_format: str,
        names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        score: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 1,
        tile: int | None = None,
        overlap: float = 0.2,
        divisibility: int = 0,
        square_size: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: give 1 or more")
        if tile is not None:
            check_tiles(tile, overlap)
        self.names = tuple(names)
        self.category_ids = None if category_ids is None else tuple(category_ids)
        self.score, self.classes = score, classes
        if classes is not None:
            class_indices(classes, self.names)  # that they exist
        self.batch_size, self.tile, self.overlap = batch_size, tile, overlap
        self._model, self._prepare = model, prepare
        self._image_format = image_format
        self._divisibility, self._square_size = divisibility, square_size

    @classmethod
    def load(
        cls,
        config: str | os.PathLike | CfgNode,
        weights: str | os.PathLike = "",
        *,
        device: str | None = None,
        score: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 1,
        tile: int | None = None,
        overlap: float = 0.2,
        opts: Sequence[str] = (),
    ) -> RetinaPredictor:
        """A predictor from a config and weights.

        Resizing, precision and test-time augmentation are those of the config, as in an evaluation.

        Args:
            config: a file, the name of one of the paper's configs, or a config.
            weights: a file or URL in any format that training reads; "": ``MODEL.WEIGHTS``.
            device: "cpu", "cuda", "cuda:1"; None: ``MODEL.DEVICE``, or the CPU if there is no GPU.
            score: drop detections below it; None: ``MODEL.RETINANET.SCORE_THRESH_TEST``.
            classes: names of the classes to keep; None: all.
            batch_size: images that go through the network at once, where lists, folders or videos
                give enough of one size.
            tile: for images larger than this many pixels: detect in tiles of this side, and merge.
                Images may then have a billion pixels, and else the number that Pillow allows.
            overlap: of neighbouring tiles, as a part of their side. An object that is not larger
                than the overlap is whole in one tile.
            opts: overrides of the config, [key, value, ...].

        Raises:
            ConfigError: a config, weights or a value that cannot be used; one line.
        """
        cfg = prediction_cfg(config, weights, device=device, opts=opts, score=score)
        mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
        prepare = getattr(mapper, "prepare_image", None)
        if prepare is None:
            raise ConfigError(
                f"INPUT.MAPPER {cfg.INPUT.MAPPER} has no prepare_image(image), which makes the "
                "model's input of an image without a record: add it, or set INPUT.MAPPER FastMapper"
            )
        model, (names, category_ids) = load_model(cfg)
        backbone = getattr(model, "backbone", None)
        if cfg.TEST.AUG.ENABLED:
            prepare = unresized(build_resizes(cfg))
        return cls(
            build_detector(cfg, model),
            prepare,
            image_format=cfg.INPUT.FORMAT,
            names=names,
            category_ids=category_ids,
            score=score,
            classes=classes,
            batch_size=batch_size,
            tile=tile,
            overlap=overlap,
            divisibility=getattr(backbone, "size_divisibility", 0),
            square_size=getattr(backbone, "padding_constraints", {}).get("square_size", 0),
        )

    @classmethod
    def from_model(cls, name: str, **options: Any) -> RetinaPredictor:
        """A predictor from a public model's name: its config and weights are fetched and kept.

            predictor = RetinaPredictor.from_model("torchvision/retinanet_resnet50_fpn_v2")

        Args:
            name: of the table of public models.
            options: those of :meth:`load`.

        Raises:
            ConfigError: the name is unknown, or the weights can't be fetched.
        """
        from retina_plugin.weights.public_models import prepare_model  # of use here only

        config, weights = prepare_model(name)
        return cls.load(config, weights, **options)

    def __call__(self, source: Any) -> Any:
        """Detect in one image, several, a folder or a video.

        Args:
            source: a path, an (H, W, 3) uint8 BGR array (also grey or BGRA), or a PIL image; a list
                or tuple of these; a folder or a video.

        Returns:
            One :class:`Predictions`; a list of them for a list; an iterator for a folder (its
            images by name) and for a video (its frames).

        Raises:
            BadImageError: an image cannot be used. In a folder: see :meth:`stream` to go on.
            ConfigError: it is nothing of these.
        """
        if isinstance(source, (list, tuple)):
            return list(self.stream(source))
        if isinstance(source, (str, os.PathLike)):
            if os.path.isdir(source):
                return self.stream(list_folder(source))
            if is_video(source):
                return (found for _, found in self.run(read_video(os.fspath(source)).frames()))
        (found,) = self.stream([source])
        return found

    def stream(
        self, sources: Iterable[Any], on_error: OnError | None = None
    ) -> Iterator[Predictions]:
        """Detections of each image, in order, as they are ready. Memory stays bounded.

        Args:
            sources: images in the forms of a call.
            on_error: is called with a source that cannot be used and the error; there is no result
                for it. None: the error is raised.
        """
        for _, found in self.run(read_frames(sources, on_error), on_error):
            yield found

    def run(
        self, frames: Iterable[Frame], on_error: OnError | None = None
    ) -> Iterator[tuple[Frame, Predictions]]:
        """Each frame with its detections, in order. A thread reads ahead of the model."""
        if self.tile is not None:
            yield from self._run_in_tiles(frames, self.tile, on_error)
        else:
            prepared = read_ahead(self._prepared(frames, on_error), _READ_AHEAD)
            for frame, found in self._in_batches(prepared):
                yield frame, found.filter(classes=self.classes)

    def _run_in_tiles(
        self, frames: Iterable[Frame], side: int, on_error: OnError | None
    ) -> Iterator[tuple[Frame, Predictions]]:
        with large_images():
            for frame in read_ahead(frames, 1):
                try:
                    found = self._detect_in_tiles(frame, side)
                except BadImageError as error:
                    if on_error is None:
                        raise
                    on_error(frame, error)
                else:
                    # not before the merge: a whole object of another class replaces its parts
                    yield frame, found.filter(classes=self.classes)

    def _prepared(self, frames: Iterable[Frame], on_error: OnError | None) -> Iterator[_Prepared]:
        for frame in frames:
            try:
                yield self._prepared_one(frame)
            except BadImageError as error:
                if on_error is None:
                    raise
                on_error(frame, error)

    def _prepared_one(self, frame: Frame) -> _Prepared:
        pixels = in_format(frame.pixels, self._image_format)
        try:
            tensor = self._prepare(pixels)
            empty = 0 in tensor.shape
        except (RuntimeError, ValueError):  # torch's and Pillow's of a size of 0
            empty = True
        if empty:
            height, width = pixels.shape[:2]
            raise BadImageError(
                f"{describe(frame)} of {width}x{height} pixels has no pixel left on its short side "
                "when it is resized to the test size: cut it into parts"
            )
        return _Prepared(frame, tensor)

    def _in_batches(self, prepared: Iterable[_Prepared]) -> Iterator[tuple[Frame, Predictions]]:
        results = grouped(
            prepared,
            key=lambda x: padded_size(x.tensor, self._divisibility, self._square_size),
            size=lambda x: x.tensor.nbytes + x.frame.pixels.nbytes,
            run=self._detect,
            batch_size=self.batch_size,
        )
        for entry, found in results:
            yield entry.frame, found.filter(score=self.score)

    @torch.inference_mode()
    def _detect(self, batch: list[_Prepared]) -> list[Predictions]:
        inputs = []
        for x in batch:
            height, width = x.frame.pixels.shape[:2]
            inputs.append({"image": x.tensor, "height": height, "width": width})
        found = []
        for x, output in zip(batch, self._model(inputs), strict=True):
            instances = output["instances"].to("cpu")
            found.append(
                self._predictions(
                    instances.pred_boxes.tensor.float().numpy(),
                    instances.scores.float().numpy(),
                    instances.pred_classes.numpy(),
                    x.frame,
                )
            )
        return found

    def _predictions(
        self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, frame: Frame
    ) -> Predictions:
        height, width = frame.pixels.shape[:2]
        found = Predictions(
            boxes, scores, classes, (height, width), self.names, self.category_ids, frame.path
        )
        # torchvision's models keep boxes outside the image, which are clipped to no area
        return found[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]

    def _detect_in_tiles(self, frame: Frame, side: int) -> Predictions:
        height, width = frame.pixels.shape[:2]
        grid = tile_grid(height, width, side, self.overlap)

        def cut_out(tile: Tile) -> Frame:
            return Frame(frame.pixels[tile.y0 : tile.y1, tile.x0 : tile.x1], frame.path)

        prepared = (self._prepared_one(cut_out(tile)) for tile in grid)
        found = [detected for _, detected in self._in_batches(prepared)]
        if len(grid) == 1:
            return found[0]
        tiles = np.repeat(np.array(grid, np.float32), [len(x) for x in found], axis=0)
        boxes = np.concatenate([x.boxes for x in found]) + np.tile(tiles[:, :2], 2)
        scores = np.concatenate([x.scores for x in found])
        classes = np.concatenate([x.class_ids for x in found])
        merged = merge_tiles(tiles, boxes, scores, classes, (height, width))
        return self._predictions(*merged, frame)
