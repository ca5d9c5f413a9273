"""Draw one scene of the embedded digits: digits, and clutter that looks like them, on a photo."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import cv2
import numpy as np

__all__ = ["Scene", "SceneSpec", "compose_scene"]

# an image (S, S, 3) BGR uint8, and the box XYWH and class of each digit
Scene = tuple[np.ndarray, list[tuple[list[int], int]]]

_VERSION = 2  # of the code that composes scenes: raise it when pixels change


@dataclass(frozen=True)
class SceneSpec:
    """What the scenes look like. Lengths are in pixels."""

    image_size: int = 160
    num_train: int = 3000
    num_dev: int = 200
    num_val: int = 200
    min_digits: int = 1
    max_digits: int = 6
    min_side: int = 18  # longer side of a digit's box
    max_side: int = 90
    max_overlap: float = 0.05  # of two boxes, as a share of the smaller one's area
    min_contrast: float = 60.0  # grey levels between the ink and the mean of the pixels under it
    num_dev_digits: int = 200  # of the 1797
    num_val_digits: int = 500
    seed: int = 0
    min_clutter: int = 0  # pieces that look like digits and have no box
    max_clutter: int = 0
    more_photos: bool = False  # scikit-image's seven as well, not only scikit-learn's two

    @property
    def digest(self) -> str:
        """Eight hexadecimal characters that identify the scenes, for the folder's name."""
        settings = asdict(self)
        for name in ("min_clutter", "max_clutter", "more_photos"):
            if not settings[name]:
                del settings[name]  # scenes without them keep their folder
        text = json.dumps([_VERSION, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def compose_scene(
    rng: np.random.Generator,
    digits: np.ndarray,
    labels: np.ndarray,
    photos: list[np.ndarray],
    spec: SceneSpec,
) -> Scene:
    """Draw random digits, and then clutter, on a random crop of a photo.

    Args:
        rng: makes every random choice.
        digits, labels: the digits to choose from, (D, 8, 8) ink in [0, 1], and their classes (D,).
        photos: BGR uint8.
        spec: sizes and limits.

    Returns:
        The image (image_size, image_size, 3) BGR uint8, and the box XYWH and class of each digit.
    """
    size = spec.image_size
    image = _background(rng, photos, size).astype(np.float32)
    objects: list[tuple[list[int], int]] = []
    drawn: list[list[int]] = []  # boxes of digits and clutter
    num_digits = int(rng.integers(spec.min_digits, spec.max_digits + 1))
    num_clutter = 0
    if spec.max_clutter:
        num_clutter = int(rng.integers(spec.min_clutter, spec.max_clutter + 1))
    for number in range(num_digits + num_clutter):
        which = int(rng.integers(len(digits)))
        # log-uniform: as many digits between 18 and 36 pixels as between 36 and 72
        side = float(np.exp(rng.uniform(np.log(spec.min_side), np.log(spec.max_side))))
        is_digit = number < num_digits
        ink = _enlarge(digits[which] if is_digit else _scramble(rng, digits[which]), side)
        h, w = ink.shape
        for _ in range(20):  # attempts to find a free place; otherwise it is left out
            x, y = int(rng.integers(size - w + 1)), int(rng.integers(size - h + 1))
            if all(_overlap((x, y, w, h), box) <= spec.max_overlap for box in drawn):
                under = image[y : y + h, x : x + w]
                colour = _colour(rng, under, ink, spec.min_contrast)
                under += ink[:, :, None] * (colour - under)
                drawn.append([x, y, w, h])
                if is_digit:
                    objects.append(([x, y, w, h], int(labels[which])))
                break
    return np.clip(image.round(), 0, 255).astype(np.uint8), objects


def _scramble(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Clutter with a digit's strokes: its four quarters exchanged, and each turned."""
    n = len(digit) // 2
    quarters = [digit[y : y + n, x : x + n] for y in (0, n) for x in (0, n)]
    while True:
        order = rng.permutation(4)
        if (order != np.arange(4)).all():  # none stays in its place
            break
    turned = [np.rot90(quarters[i], int(rng.integers(4))) for i in order]
    return np.block([turned[:2], turned[2:]])


def _background(rng: np.random.Generator, photos: list[np.ndarray], size: int) -> np.ndarray:
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(size // 2, min(photo.shape[:2]) + 1))
    y = int(rng.integers(photo.shape[0] - side + 1))
    x = int(rng.integers(photo.shape[1] - side + 1))
    crop = photo[y : y + side, x : x + side]
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


def _enlarge(digit: np.ndarray, side: float) -> np.ndarray:
    """The digit's ink as opacity in [0, 1], cropped to the ink; the longer side is ``side``."""
    scale = 16  # find the extent of the ink at a fine resolution, so that boxes are tight
    fine = cv2.resize(digit.astype(np.float32), None, fx=scale, fy=scale)
    ys, xs = np.where(fine > 0.3)
    fine = fine[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    factor = side / max(fine.shape)
    w, h = (max(4, round(n * factor)) for n in (fine.shape[1], fine.shape[0]))
    ink = cv2.resize(fine, (w, h), interpolation=cv2.INTER_AREA)
    return np.clip((ink - 0.2) * 2.0, 0.0, 1.0)


def _colour(
    rng: np.random.Generator, under: np.ndarray, ink: np.ndarray, min_contrast: float
) -> np.ndarray:
    """A random BGR colour whose brightness differs enough from the pixels under the ink."""
    brightness = np.array([0.114, 0.587, 0.299], dtype=np.float32)
    covered = float((under @ brightness * ink).sum() / ink.sum())
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(colour @ brightness) - covered) >= min_contrast:
            return colour


def _overlap(a: tuple[int, int, int, int], b: list[int]) -> float:
    """Intersection of two XYWH boxes over the smaller one's area."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])
