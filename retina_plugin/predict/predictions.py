"""What a predictor finds in one image, as plain arrays, and its conversions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from retina_plugin.errors import ConfigError, did_you_mean

from .drawing import draw_boxes
from .images import ImageLike, as_bgr

__all__ = ["Predictions", "class_indices"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Detections in one image, by decreasing score. S is their number.

        found = predictor("street.jpg")
        print(len(found), found.boxes, found.scores, found.class_names)
        cars = found.filter(score=0.5, classes=["car"])
        cv2.imwrite("cars.jpg", cars.draw("street.jpg"))

    Args:
        boxes: (S, 4) float32 XYXY in pixels of the image that was given.
        scores: (S,) float32 probabilities.
        class_ids: (S,) int64 in [0, K).
        image_size: height and width of the image.
        names: the names of the model's K classes.
        category_ids: the dataset's id of each class; None: ids are the classes themselves.
        path: the image's file, if it was read from one.
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    image_size: tuple[int, int]
    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None
    path: str | None = None

    @property
    def class_names(self) -> list[str]:
        """The class name of each detection."""
        return [self.names[k] for k in self.class_ids.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Predictions:
        """Some of the detections: ``found[0]``, ``found[:5]``, ``found[found.scores > 0.5]``."""
        if isinstance(index, (int, np.integer)):
            index = [range(len(self))[index]]  # raises IndexError, which ends a loop
        return dataclasses.replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            class_ids=self.class_ids[index],
        )

    def filter(
        self, *, score: float | None = None, classes: Sequence[str] | None = None
    ) -> Predictions:
        """The detections with at least this score and one of these class names.

        Raises:
            ConfigError: the model has no class of a name.
        """
        keep = np.ones(len(self), bool)
        if score is not None:
            keep &= self.scores >= score
        if classes is not None:
            keep &= np.isin(self.class_ids, class_indices(classes, self.names))
        return self[keep]

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """COCO's result list, one dict for each detection, ready for JSON and ``COCO.loadRes``.

        ``bbox`` is XYWH in pixels. ``category_id`` is the dataset's id where the predictor knows
        it, otherwise the class's index. ``category_name``, and ``file_name`` if there is one, are
        not COCO's; pycocotools passes over them.
        """
        extra = {} if self.path is None else {"file_name": self.path}
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        boxes = np.concatenate([self.boxes[:, :2], sizes], axis=1).tolist()
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[k] if self.category_ids else k,
                "bbox": box,
                "score": score,
                **extra,
                "category_name": self.names[k],
            }
            for box, score, k in zip(boxes, self.scores.tolist(), self.class_ids.tolist())
        ]

    def to_instances(self) -> Instances:
        """Detectron2's ``Instances`` on the CPU, as its ``DefaultPredictor`` gives them."""
        return Instances(
            self.image_size,
            pred_boxes=Boxes(torch.from_numpy(self.boxes.copy())),
            scores=torch.from_numpy(self.scores.copy()),
            pred_classes=torch.from_numpy(self.class_ids.copy()),
        )

    def to_supervision(self) -> Any:
        """``supervision.Detections`` with the names under ``data["class_name"]``.

        Raises:
            ConfigError: the package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ConfigError(
                "to_supervision() needs the package supervision: "
                "pip install 'retina_plugin[supervision]'"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def draw(self, image: ImageLike | None = None) -> np.ndarray:
        """A copy of the image with boxes, names and scores.

        Args:
            image: a path, a BGR array or a PIL image. None reads ``path`` again.

        Returns:
            (H, W, 3) uint8 BGR, ready for ``cv2.imwrite``.

        Raises:
            ConfigError: the image has another size, or there is none.
        """
        if image is None:
            if self.path is None:
                raise ConfigError("draw(): give the image, because these detections have no file")
            image = self.path
        pixels = as_bgr(image)
        if pixels.shape[:2] != self.image_size:
            (height, width), (expected_height, expected_width) = pixels.shape[:2], self.image_size
            raise ConfigError(
                f"draw(): the image has {width}x{height} pixels, but the detections are of one "
                f"with {expected_width}x{expected_height}"
            )
        return draw_boxes(pixels, self.boxes, self.scores, self.class_ids, self.names)


def class_indices(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of the classes with these names. A name may be there more than once.

    Raises:
        ConfigError: a name is none of the classes.
    """
    if isinstance(wanted, str):
        raise ConfigError(f"classes: give a list of names, got the text '{wanted}'")
    for name in wanted:
        if name not in names:
            few = f"; known: {', '.join(names)}" if len(names) <= 100 else ""
            same = (known for known in names if known.casefold() == str(name).casefold())
            hint = did_you_mean(next(same, name), names)
            raise ConfigError(f"classes: the model has no class '{name}'{hint}{few}")
    return [k for k, name in enumerate(names) if name in wanted]
