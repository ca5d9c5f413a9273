"""Detect with a file of `retina export --format onnx`, without PyTorch or retina_plugin.

Copy this file beside the model. It needs numpy, Pillow and onnxruntime:

    pip install numpy Pillow onnxruntime
    python standalone.py model.onnx street.jpg --score 0.5 --json found.json --draw drawn

or in a program:

    from standalone import Detector

    detect = Detector("model.onnx")
    found = detect("street.jpg")
    for box, score, name in zip(found.boxes, found.scores, found.class_names):
        print(name, score, box)

Sizes, channel order, class names and thresholds are read from the model's file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = ["Detections", "Detector", "DetectorError", "main"]

# For class names with letters that Pillow's own font lacks, which is almost all but ASCII.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
)


class DetectorError(ValueError):
    """A model or an image that cannot be used: one line with the reason."""


@dataclass(frozen=True)
class Detections:
    """Detections in one image, by decreasing score. S is their number.

    Args:
        boxes: (S, 4) float32 XYXY in pixels of the image that was given.
        scores: (S,) float32 probabilities.
        class_ids: (S,) int64, indices of ``names``.
        image_size: height and width of the image.
        names: of the model's classes.
        category_ids: the dataset's id of each class; None: ids are the indices themselves.
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    image_size: tuple[int, int]
    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None

    @property
    def class_names(self) -> list[str]:
        """The class name of each detection."""
        return [self.names[k] for k in self.class_ids.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """The detections with at least this score."""
        keep = self.scores >= score
        few = (self.boxes[keep], self.scores[keep], self.class_ids[keep])
        return Detections(*few, self.image_size, self.names, self.category_ids)

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """COCO's result list: one dict for each detection, ``bbox`` is XYWH in pixels."""
        boxes = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        ids = self.category_ids or range(len(self.names))
        return [
            {
                "image_id": image_id,
                "category_id": ids[k],
                "bbox": box,
                "score": score,
                "category_name": self.names[k],
            }
            for box, score, k in zip(boxes.tolist(), self.scores.tolist(), self.class_ids.tolist())
        ]


class Detector:
    """An exported model that is called with an image.

    Args:
        path: of the .onnx file.
        threads: of the computation; None: one for each core.
        providers: of onnxruntime, in order of preference.

    Raises:
        DetectorError: onnxruntime is missing, or the file cannot be used; one line.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DetectorError(f"onnxruntime: {error}: pip install onnxruntime") from None
        if not os.path.isfile(path):
            raise DetectorError(f"{path} does not exist or is not a file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # its errors have no common class
            raise DetectorError(f"{path}: onnxruntime cannot read it: {_line(error)}") from None
        entries = self._session.get_modelmeta().custom_metadata_map
        self.metadata = _checked(path, entries.get("retina_plugin"))
        self.names = tuple(self.metadata["class_names"])
        ids = self.metadata["category_ids"]
        self.category_ids = None if ids is None else tuple(ids)

    def __call__(self, image: str | os.PathLike | Image.Image | np.ndarray) -> Detections:
        """Detect in an image.

        Args:
            image: a path, a PIL image, or an (H, W, 3) uint8 BGR array as OpenCV reads it.

        Raises:
            DetectorError: the image cannot be read.
        """
        pixels = _array(image) if isinstance(image, np.ndarray) else read_image(image)
        height, width = pixels.shape[:2]
        resized = self._resize(pixels)
        if 0 in resized.shape:
            raise DetectorError(f"an image of {width}x{height} pixels is too thin: cut it in parts")
        if self.metadata["format"] == "BGR":
            resized = resized[:, :, ::-1]
        tensor = np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32)[None]
        try:
            outputs = self._session.run(["boxes", "scores", "classes"], {"image": tensor})
        except Exception as error:
            raise DetectorError(f"onnxruntime cannot run the model: {_line(error)}") from None
        boxes, scores, classes = (output[0] for output in outputs)
        scale = np.array([width / resized.shape[1], height / resized.shape[0]] * 2, np.float32)
        boxes = boxes * scale
        if self.metadata["boxes_outside"] != "clip":  # such a model has clipped them itself
            boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        # classes are padded with -1; a box outside the image is clipped to no area
        keep = (classes >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        found = (boxes[keep], scores[keep], classes[keep])
        return Detections(*found, (height, width), self.names, self.category_ids)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        short, longest = self.metadata["min_size"], self.metadata["max_size"]
        height, width = pixels.shape[:2]
        if short == 0:  # Detectron2's: not resized
            return pixels
        if self.metadata["resize"] == "torchvision":
            scale = min(short / min(height, width), longest / max(height, width))
            new = (max(1, int(height * scale)), max(1, int(width * scale)))
            return resize_without_antialias(pixels, *new)
        new = resized_size(height, width, short, longest)
        if new == (height, width) or 0 in new:
            return pixels[: new[0], : new[1]]
        if self.metadata["resampler"] == "pillow":
            resized = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BILINEAR)
            return np.asarray(resized)
        return resize_like_torch(pixels, *new)


def _checked(path: str | os.PathLike, text: str | None) -> dict[str, Any]:
    """The metadata of a model that this file can run."""
    again = "write it with `retina export --format onnx`"
    if text is None:
        raise DetectorError(f"{path} has no metadata of retina_plugin: {again}")
    try:
        metadata = json.loads(text)
        version, stage = metadata["version"], metadata["stage"]
    except (ValueError, KeyError, TypeError):
        raise DetectorError(f"{path}: its metadata cannot be read: {again}") from None
    if version != 1:
        raise DetectorError(f"{path} has metadata of version {version}, this file reads version 1")
    if stage != "nms":
        raise DetectorError(
            f"{path} was exported with --output-stage {stage}: its outputs are no detections. "
            "Export it again with --output-stage nms"
        )
    if metadata.get("resampler") == "custom":
        raise DetectorError(
            f"{path} was exported with an INPUT.MAPPER that prepares images in its own way: run it "
            "in a program that does so too"
        )
    return metadata


def read_image(image: str | os.PathLike | Image.Image) -> np.ndarray:
    """(H, W, 3) RGB pixels, upright by the camera's orientation, without transparency.

    A PNG is checked by its checksums. Other formats have none: of a damaged JPEG Pillow only finds
    that a part is missing.

    Raises:
        DetectorError: it is missing, no image, found to be damaged, or has more than 8 bits a
            channel.
    """
    name = "the PIL image" if isinstance(image, Image.Image) else os.fspath(image)
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as file:
                if file.format == "PNG":
                    file.verify()  # its checksums, which are not compared when it is decoded
            image = Image.open(image)
        if image.mode[0] in "IF":
            raise DetectorError(f"{name} has more than 8 bits a channel: convert it to 8 bit")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except DetectorError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else _line(error)
        raise DetectorError(f"cannot read the image {name}: {reason}") from None


def _array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        shape = " x ".join(map(str, image.shape))
        raise DetectorError(f"give an (H, W, 3) uint8 BGR array, got {shape} {image.dtype}")
    return image[:, :, ::-1]


def resized_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Detectron2's: the short side gets ``short`` pixels, the long one ``longest`` at most."""
    scale = short / min(height, width)
    new_height, new_width = scale * height, scale * width
    if height < width:
        new_height = float(short)
    else:
        new_width = float(short)
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def resize_like_torch(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """``torch.nn.functional.interpolate(..., mode="bilinear", antialias=True)`` of uint8 pixels.

    Equal to the bit: a triangle filter, as wide as the scale where the image shrinks; its weights
    are 16-bit integers; horizontally first; rounded to uint8 after each pass.
    """
    if width != pixels.shape[1]:
        pixels = _filter_rows(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2)
    if height != pixels.shape[0]:
        pixels = _filter_rows(pixels, height)
    return pixels


def _filter_rows(pixels: np.ndarray, size: int) -> np.ndarray:
    """Make ``size`` rows of the rows of (H, W, C) pixels."""
    old = len(pixels)
    scale = old / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(int), 0)
    last = np.minimum((centers + support + 0.5).astype(int), old)
    rows = first[:, None] + np.arange((last - first).max())
    weights = 1 - np.abs((rows - centers[:, None] + 0.5) * (1 / support))
    weights = np.where(rows < last[:, None], weights.clip(0), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2 ** (b + 1)) >= 2**15)
    weights = np.floor(0.5 + weights * 2**bits).astype(np.int32)
    flat = pixels.reshape(old, -1)
    out = np.empty((size, flat.shape[1]), np.uint8)
    for start in range(0, size, 16):  # so few that the sums stay in the processor's cache
        block = slice(start, start + 16)
        sums = np.full(out[block].shape, 2 ** (bits - 1), np.int32)
        for row, weight in zip(rows[block].T, weights[block].T):
            sums += flat[np.minimum(row, old - 1)] * weight[:, None]
        out[block] = (sums >> bits).clip(0, 255)
    return out.reshape(size, *pixels.shape[1:])


def resize_without_antialias(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The resize of torchvision's detectors: bilinear, not rounded, float32."""
    image = pixels.astype(np.float32)
    for axis, size in enumerate((height, width)):
        old = image.shape[axis]
        sources = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(old / size) - 0.5
        sources = sources.clip(0)
        low = np.minimum(sources.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (sources - low.astype(np.float32)).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        image = image.take(low, axis) * (1 - part) + image.take(high, axis) * part
    return image


def draw(image: Image.Image, found: Detections) -> Image.Image:
    """A copy of an RGB image with boxes, class names and scores; the best on top."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(max(drawn.size) / 400))
    height = max(10, round(max(drawn.size) / 50))
    for i in range(len(found))[::-1]:
        hue = int(255 * (0.08 + found.class_ids[i] * 0.618034) % 255)  # golden ratio: far apart
        colour = Image.new("HSV", (1, 1), (hue, 217, 255)).convert("RGB").getpixel((0, 0))
        box = found.boxes[i].tolist()
        pen.rectangle(box, outline=colour, width=line)
        label = f"{found.class_names[i]} {found.scores[i]:.2f}"
        font = _font(label, height)
        corner = (box[0], max(0, box[1] - height - 2 * line))
        pen.rectangle(pen.textbbox(corner, label, font), fill=colour)
        pen.text(corner, label, fill="black", font=font)
    return drawn


def _font(text: str, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font for ASCII, else the first one on this machine that has all letters."""
    own = ImageFont.load_default(height)
    fonts = () if text.isascii() else _fonts(height)
    return next((font for font in fonts if _has_letters(font, text)), own)


@functools.lru_cache
def _fonts(height: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in _FONTS:
        with contextlib.suppress(OSError):  # it is not here
            fonts.append(ImageFont.truetype(name, height))
    return fonts


def _has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = bytes(font.getmask("\U0010ffff"))  # no letter: what a font draws instead of one
    return all(bytes(font.getmask(letter)) != missing for letter in text)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Images that cannot be read are named and left out; the exit status is then 1."""
    parser = argparse.ArgumentParser(description="Detect with a file of `retina export`.")
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--score", type=_score, default=0.3, help="lowest score (default: .3)")
    parser.add_argument("--json", metavar="FILE", help="write COCO's result list")
    parser.add_argument("--draw", metavar="FOLDER", help="write the images with their boxes")
    args = parser.parse_intermixed_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a class name that a terminal cannot show
    try:
        targets = _targets(args.images, args.draw)
        if args.json:  # or fail before all images were detected
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).open("a").close()
        entries, failed = _detect_all(Detector(args.model), args, targets)
        if args.json:
            Path(args.json).write_text(json.dumps(entries, indent=0) + "\n", encoding="utf-8")
    except (DetectorError, OSError) as error:
        sys.exit(f"error: {_line(error)}")
    sys.exit(1 if failed else 0)


def _score(text: str) -> float:
    score = float(text)
    if not 0 <= score <= 1:  # also nan
        raise argparse.ArgumentTypeError(f"{text}: give a probability from 0 to 1")
    return score


def _targets(images: Sequence[str], folder: str | None) -> list[Path]:
    """The drawn image of each input; none if no folder is given.

    Raises:
        DetectorError: one would replace an input.
    """
    if folder is None:
        return []
    taken: set[str] = set()
    # lower case, as some file systems compare
    inputs = {os.path.realpath(path).lower() for path in images}
    targets = [Path(folder, f"{_unused(Path(path).stem, taken)}.png") for path in images]
    for target in targets:
        if os.path.realpath(target).lower() in inputs:
            raise DetectorError(
                f"--draw: the drawn image {target} would replace an input: choose another folder"
            )
    return targets


def _detect_all(
    detect: Detector, args: argparse.Namespace, targets: Sequence[Path]
) -> tuple[list[dict[str, Any]], int]:
    entries: list[dict[str, Any]] = []
    failed = 0
    stems = [Path(path).stem for path in args.images]
    # a name that is a number is its own id, as in COCO (000000000139.jpg)
    numbers = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems)
    for number, path in enumerate(args.images, 1):
        try:
            pixels = read_image(path)
            found = detect(pixels[:, :, ::-1]).above(args.score)
        except DetectorError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed += 1
            continue
        image_id = int(Path(path).stem) if numbers else number
        print(f"{path}: {len(found)} detections")
        for box, score, name in zip(found.boxes, found.scores, found.class_names):
            print(f"  {name:20} {score:.3f}  {' '.join(f'{x:.1f}' for x in box)}")
        entries += [{**entry, "file_name": path} for entry in found.to_coco(image_id)]
        if targets:
            target = targets[number - 1]
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(Image.fromarray(pixels), found).save(target)
    return entries, failed


def _unused(name: str, taken: set[str]) -> str:
    """``name``, or ``name_2``, ... if it is taken; lower case, as some file systems compare."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    free = next(n for n in names if n.lower() not in taken)
    taken.add(free.lower())
    return free


if __name__ == "__main__":
    main()
