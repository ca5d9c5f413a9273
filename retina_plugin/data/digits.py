"""An embedded detection dataset: real handwritten digits on real photos, without a download.

scikit-learn ships 1797 handwritten digits (8x8 pixels, the UCI test set) and two photos. Digits are
enlarged, coloured and drawn over random crops of the photos; a box is the extent of a digit's ink.
The digits are split first, so that no digit is in two of train, dev (to choose settings) and val
(to report). The same seed gives the same scenes. They are written once, in COCO format, to a folder
in the cache.

There are two sets. ``digits_scenes`` has large digits. ``digits_sparse`` has a few small ones among
clutter that looks like digits, on seven photos of scikit-image too.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from retina_plugin.cache import Fingerprint, atomic_write, cache_root, only_writer
from retina_plugin.errors import ConfigError

from .scenes import Scene, SceneSpec, compose_scene

__all__ = ["CLASSES", "SceneSpec", "compose_scene", "prepare", "register"]

CLASSES = [str(d) for d in range(10)]

logger = logging.getLogger("retina_plugin")

MANIFEST = "manifest.json"  # fingerprints of the files of the folder

SPEC = SceneSpec()

# As imbalanced as the paper's images, as far as a laptop goes: larger images, fewer and smaller
# digits, and hard negatives.
SPARSE_SPEC = SceneSpec(
    image_size=192,
    num_train=2000,
    num_val=500,
    min_digits=1,
    max_digits=3,
    min_side=14,
    max_side=48,
    min_clutter=4,
    max_clutter=10,
    more_photos=True,
)

# Of scikit-image's pictures: photos that are in the public domain or have the licence CC0, as the
# docstrings of skimage.data say.
_SKIMAGE_PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel")


def dataset_root(spec: SceneSpec = SPEC) -> Path:
    """The folder that :func:`prepare` writes the scenes of ``spec`` to."""
    return cache_root() / f"digits_scenes-{spec.digest}"


def prepare(spec: SceneSpec = SPEC) -> Path:
    """Write the scenes if they are not there yet or are damaged, and return their folder.

    The folder appears completely or not at all. Several processes may call this at once: one
    writes, the others wait.

    Raises:
        ConfigError: the folder cannot be written.
        ModuleNotFoundError: without scikit-learn, or without scikit-image if it is needed. The
            extra ``demo`` installs both.
    """
    root = dataset_root(spec)
    if root.is_dir() and _damaged_file(root) is None:
        return root
    try:
        with only_writer(root.parent):
            _write_scenes(root, spec)
    except OSError as error:
        where = f" (its {_damaged_file(root)} is damaged: delete the folder)" * root.is_dir()
        raise ConfigError(
            f"cannot write the embedded digits to {root}{where}: {error.strerror or error}; make "
            "room or the folder writable, or name another one in the environment variable "
            "RETINA_PLUGIN_CACHE"
        ) from None
    return root


def _write_scenes(root: Path, spec: SceneSpec) -> None:
    """Replace ``root``, unless another process has just done so."""
    damaged = _damaged_file(root) if root.is_dir() else None
    if root.is_dir():
        if damaged is None:
            return
        logger.warning("%s is damaged: %s; writing it again", root, damaged)
    digits, labels = _digits()
    photos = _photos(spec.more_photos)
    logger.info("Writing the embedded digits to %s (once, some seconds)", root)
    order = np.random.default_rng([spec.seed, 0]).permutation(len(digits))
    val, dev, train = np.split(order, np.cumsum([spec.num_val_digits, spec.num_dev_digits]))
    parts = {
        "val": (val, spec.num_val, 1),
        "train": (train, spec.num_train, 2),
        "dev": (dev, spec.num_dev, 3),
    }
    with atomic_write(root) as partial:
        partial.mkdir()
        for split, (chosen, num_images, stream) in parts.items():
            rng = np.random.default_rng([spec.seed, stream])
            scenes = (
                compose_scene(rng, digits[chosen], labels[chosen], photos, spec)
                for _ in range(num_images)
            )
            _write_coco(partial, split, scenes)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(partial)): Fingerprint.of(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(manifest))
        if damaged is not None:
            root.rename(partial.parent / "damaged")  # deleted with the temporary folder


def _damaged_file(root: Path) -> str | None:
    """The first file that is not as it was written; None if all are."""
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        fingerprints = {name: Fingerprint(*values) for name, values in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return MANIFEST
    damaged = (name for name, x in fingerprints.items() if not x.matches(f"{root}/{name}"))
    return next(damaged, None)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) ink in [0, 1], (1797,) labels."""
    data = _sklearn_datasets().load_digits()
    return data.images / 16.0, data.target


def _photos(more: bool) -> list[np.ndarray]:
    """BGR photos: scikit-learn's two, and scikit-image's."""
    photos = [x[:, :, ::-1].copy() for x in _sklearn_datasets().load_sample_images().images]
    if more:
        found = importlib.util.find_spec("skimage")  # the extra "demo"
        if found is None or found.origin is None:
            raise _missing_package("scikit-image", "skimage")
        folder = Path(found.origin).parent / "data"  # without an import, which takes seconds
        for name in _SKIMAGE_PHOTOS:
            path = folder / f"{name}.png"
            photo = cv2.imread(str(path))
            if photo is None:
                raise ConfigError(f"{path} cannot be read: install scikit-image again")
            photos.append(photo)
    return photos


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets  # the extra "demo"
    except ModuleNotFoundError:
        raise _missing_package("scikit-learn", "sklearn") from None
    return datasets


def _missing_package(name: str, module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the embedded dataset needs {name}: pip install 'retina_plugin[demo]' or "
        f"pip install {name}",
        name=module,
    )


def _write_coco(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write the images of a split and their annotations, ``{split}.json``."""
    folder = root / split
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (image, objects) in enumerate(scenes, start=1):
        name = f"{index:06d}.png"
        (folder / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())
        images.append(
            {"id": index, "file_name": name, "height": image.shape[0], "width": image.shape[1]}
        )
        for (x, y, w, h), label in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,  # not 0: pycocotools reads it as "no match"
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    coco = {
        "info": {"description": "handwritten digits on photos"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / f"{split}.json").write_text(json.dumps(coco))


def register() -> None:
    """Register the splits train, dev and val of ``digits_scenes`` and ``digits_sparse``.

    They are written when they are first loaded.
    """
    for family, spec in (("digits_scenes", SPEC), ("digits_sparse", SPARSE_SPEC)):
        for split in ("train", "dev", "val"):
            _register(f"{family}_{split}", split, spec)


def _register(name: str, split: str, spec: SceneSpec) -> None:
    if name in DatasetCatalog:
        return
    json_file, image_root = dataset_root(spec) / f"{split}.json", dataset_root(spec) / split

    def load() -> list[dict[str, Any]]:
        prepare(spec)
        return load_coco_json(str(json_file), str(image_root), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        thing_classes=CLASSES,
        evaluator_type="coco",
        prepare=lambda: prepare(spec),
    )
