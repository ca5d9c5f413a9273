"""The embedded digits: disjoint splits, reproducible scenes, COCO format, tight boxes."""

import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from sklearn.datasets import load_digits

from retina_plugin.data import digits
from retina_plugin.data.scenes import _scramble
from retina_plugin.errors import ConfigError

SPEC = digits.SceneSpec(image_size=96, num_train=6, num_dev=3, num_val=4, max_side=50)
GREY = [np.full((96, 96, 3), 128, np.uint8)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The folder of the scenes of SPEC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return digits.prepare(SPEC)


@pytest.fixture(scope="module")
def grey_scenes():
    """Scenes on a uniform grey, where every pixel that changed is ink."""
    ink, labels = ink_and_labels()
    rng = np.random.default_rng(3)
    return [digits.compose_scene(rng, ink, labels, GREY, SPEC) for _ in range(40)]


def ink_and_labels():
    """scikit-learn's digits, (1797, 8, 8) in [0, 1], and their classes."""
    data = load_digits()
    return data.images / 16, data.target


def read(root, split):
    return json.loads((root / f"{split}.json").read_text())


def test_no_digit_is_in_two_splits(cache, monkeypatch):
    """Scenes of train, dev and val are composed of disjoint digits, together all 1797."""
    pools = []
    compose = digits.compose_scene

    def spy(rng, chosen, labels, photos, spec):
        pool = [digit.tobytes() for digit in chosen]
        if pool not in pools:
            pools.append(pool)
        return compose(rng, chosen, labels, photos, spec)

    monkeypatch.setattr(digits, "compose_scene", spy)
    digits.prepare(SPEC)
    val, train, dev = pools
    assert (len(val), len(dev)) == (SPEC.num_val_digits, SPEC.num_dev_digits)
    assert not set(val) & set(train) and not set(val) & set(dev) and not set(dev) & set(train)
    ink, labels = ink_and_labels()
    assert sorted(val + train + dev) == sorted(digit.tobytes() for digit in ink)
    assert set(labels) == set(range(10))


def test_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    """In two cache folders; another seed gives other files."""
    roots = []
    for name, spec in (
        ("a", SPEC),
        ("b", SPEC),
        ("c", digits.SceneSpec(**{**vars(SPEC), "seed": 1})),
    ):
        monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / name))
        roots.append(digits.prepare(spec))
    first, second, other = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in roots
    )
    for files in (first, second, other):
        assert set(json.loads(files.pop(digits.MANIFEST))) == set(files)
    assert first == second
    assert len(first) == SPEC.num_train + SPEC.num_dev + SPEC.num_val + 3
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_folder_depends_on_every_field_of_the_spec(cache):
    """So scenes of another spec are never read."""
    base = vars(SPEC)
    folders = {digits.dataset_root(SPEC)}
    for field, value in base.items():
        folders.add(digits.dataset_root(digits.SceneSpec(**{**base, field: value + 1})))
    assert len(folders) == len(base) + 1
    assert {folder.parent for folder in folders} == {cache}


def test_val_does_not_depend_on_the_size_of_train(scenes, cache):
    """So results on val stay comparable when train and dev grow."""
    more = {"num_train": SPEC.num_train + 1, "num_dev": SPEC.num_dev + 1}
    larger = digits.prepare(digits.SceneSpec(**{**vars(SPEC), **more}))
    assert (larger / "val.json").read_bytes() == (scenes / "val.json").read_bytes()
    for image in (scenes / "val").iterdir():
        assert (larger / "val" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize(("split", "num_images"), [("train", 6), ("dev", 3), ("val", 4)])
def test_coco_format(scenes, split, num_images):
    """Unique ids from 1, boxes inside the image, areas, sizes of the image files."""
    coco = read(scenes, split)
    assert [c["id"] for c in coco["categories"]] == list(range(1, 11))
    assert [c["name"] for c in coco["categories"]] == list("0123456789")
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["images"]) == num_images
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) >= 1
    assert {a["image_id"] for a in coco["annotations"]} == set(images)  # no image is empty
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        image = images[a["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        assert a["area"] == w * h > 0
        assert a["iscrowd"] == 0 and 1 <= a["category_id"] <= 10
    for image in images.values():
        pixels = cv2.imread(str(scenes / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)


def test_detectron2_loads_the_scenes(scenes):
    """Every image and annotation, with classes from 0."""
    name = "digits_test_detectron2_loads_the_scenes"
    records = load_coco_json(str(scenes / "val.json"), str(scenes / "val"), name)
    coco = read(scenes, "val")
    assert len(records) == len(coco["images"])
    classes = [a["category_id"] for record in records for a in record["annotations"]]
    assert sorted(classes) == sorted(a["category_id"] - 1 for a in coco["annotations"])
    MetadataCatalog.pop(name)


def test_number_size_and_overlap_of_digits(grey_scenes):
    """Within the limits of the spec in every scene."""
    sides = []
    for _, objects in grey_scenes:
        assert 1 <= len(objects) <= SPEC.max_digits
        boxes = [box for box, _ in objects]
        sides += [max(box[2:]) for box in boxes]
        for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
            shared_w = min(x + w, x2 + w2) - max(x, x2)
            shared_h = min(y + h, y2 + h2) - max(y, y2)
            shared = max(shared_w, 0) * max(shared_h, 0)
            assert shared <= SPEC.max_overlap * min(w * h, w2 * h2)
    assert SPEC.min_side <= min(sides) < 25 and 40 < max(sides) <= SPEC.max_side


def test_boxes_are_tight(grey_scenes):
    """No ink is outside the boxes, and it reaches each side of its box."""
    assert any(len(objects) == 1 for _, objects in grey_scenes)
    for image, objects in grey_scenes:
        changed = (image != 128).any(axis=2)
        outside = changed.copy()
        for (x, y, w, h), _ in objects:
            outside[y : y + h, x : x + w] = False
        assert not outside.any()
        if len(objects) > 1:
            continue  # another digit's ink may lie in the box
        (((x, y, w, h), _),) = objects
        ys, xs = np.where(changed)
        slack = 1 + 0.05 * max(w, h)  # the rim of the ink is faint
        assert xs.min() - x <= slack and x + w - 1 - xs.max() <= slack
        assert ys.min() - y <= slack and y + h - 1 - ys.max() <= slack


def test_digits_have_contrast(grey_scenes):
    """Ink differs from the background by at least the contrast of the spec."""
    brightness = np.array([0.114, 0.587, 0.299])  # of BGR
    for image, objects in grey_scenes:
        grey = image @ brightness
        for (x, y, w, h), _ in objects:
            # pixels are rounded: 1 grey level of tolerance
            assert abs(grey[y : y + h, x : x + w] - 128).max() >= SPEC.min_contrast - 1


def test_classes_and_shapes_are_the_digits():
    """A scene of sevens has class 7 only; a vertical stroke gives a narrow box."""
    ink, labels = ink_and_labels()
    sevens = ink[labels == 7]
    rng = np.random.default_rng(0)
    for _ in range(10):
        _, objects = digits.compose_scene(rng, sevens, np.full(len(sevens), 7), GREY, SPEC)
        assert {label for _, label in objects} == {7}
    stroke = np.zeros((1, 8, 8))
    stroke[0, 1:7, 4] = 1
    _, objects = digits.compose_scene(rng, stroke, np.array([1]), GREY, SPEC)
    assert all(h > 3 * w and label == 1 for (_, _, w, h), label in objects)


def test_prepare_writes_once(cache, monkeypatch):
    """The second call finds the folder and composes no scene."""
    root = digits.prepare(SPEC)
    assert root.parent == cache

    def fail(*args):
        raise AssertionError("composed again")

    monkeypatch.setattr(digits, "compose_scene", fail)
    assert digits.prepare(SPEC) == root


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
def test_disk_that_cannot_be_written_is_one_line(cache, monkeypatch, code, reason):
    """With the folder and RETINA_PLUGIN_CACHE. Nothing is left of what was written."""
    write = Path.write_bytes

    def fail(path, data):
        if path.parent.name == "train":
            raise OSError(code, os.strerror(code))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ConfigError) as error:
        digits.prepare(SPEC)
    line = str(error.value)
    assert line.startswith(f"cannot write the embedded digits to {digits.dataset_root(SPEC)}: ")
    assert reason in line and "RETINA_PLUGIN_CACHE" in line and "\n" not in line
    assert list(cache.iterdir()) == []


def test_cache_that_is_a_file_is_one_line(cache):
    cache.write_text("")
    with pytest.raises(ConfigError, match="cannot write the embedded digits to .*: File exists"):
        digits.prepare(SPEC)


def content(root):
    """File -> bytes, without the manifest, which has times."""
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    del files[digits.MANIFEST]
    return files


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "another content": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"012345678"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train.json", "val/000002.png", digits.MANIFEST])
def test_damaged_folder_is_written_again(scenes, cache, log, name, damage):
    """Every file that a killed run, a full disk or a person can leave behind."""
    shutil.copytree(scenes, digits.dataset_root(SPEC))
    DAMAGES[damage](digits.dataset_root(SPEC) / name)
    root = digits.prepare(SPEC)
    assert f"{root} is damaged: {name}; writing it again" in log.text
    assert content(root) == content(scenes)
    assert [path.name for path in cache.iterdir()] == [root.name]


def test_copied_folder_is_whole(scenes, cache, monkeypatch):
    """The times of its files differ, their contents do not."""
    shutil.copytree(scenes, digits.dataset_root(SPEC), copy_function=shutil.copyfile)
    monkeypatch.setattr(digits, "compose_scene", None)
    digits.prepare(SPEC)


def test_damaged_folder_that_cannot_be_written_is_named(scenes, cache, monkeypatch):
    """The line says which file is damaged and what to delete."""
    root = digits.dataset_root(SPEC)
    shutil.copytree(scenes, root)
    (root / "val.json").unlink()

    def fail(path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ConfigError, match=r"\(its val.json is damaged: delete the folder\): "):
        digits.prepare(SPEC)


WRITER = """
import os, signal, sys
from pathlib import Path
from retina_plugin.data import digits
from retina_plugin.errors import ConfigError
spec = digits.SceneSpec(image_size=96, num_train=6, num_dev=3, num_val=4, max_side=50)
if sys.argv[1] == "killed":
    write = Path.write_bytes
    def kill(path, data):
        if path.parent.name == "train" and path.name == "000003.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, data)
    Path.write_bytes = kill
compose, composed = digits.compose_scene, []
digits.compose_scene = lambda *args: composed.append(1) or compose(*args)
digits.prepare(spec)
print(len(composed))
"""


def writer(cache, how):
    env = os.environ | {"RETINA_PLUGIN_CACHE": str(cache), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", WRITER, how]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_are_killed_or_write_at_once(scenes, cache):
    """The next one sweeps what a killed one left; of two, one writes and the other waits."""
    assert writer(cache, "killed").wait(60) == -signal.SIGKILL
    assert len(list(cache.iterdir())) == 1 and not digits.dataset_root(SPEC).exists()
    two = [writer(cache, "whole") for _ in range(2)]
    composed = [int(process.communicate(timeout=60)[0]) for process in two]
    assert sorted(composed) == [0, 13] and [process.returncode for process in two] == [0, 0]
    assert [path.name for path in cache.iterdir()] == [digits.dataset_root(SPEC).name]
    assert content(digits.dataset_root(SPEC)) == content(scenes)


def test_registered_datasets_are_written_on_first_use(cache, monkeypatch):
    """Registering writes no file, loading does. The metadata has the ten classes."""
    names = ["digits_scenes_train", "digits_scenes_dev", "digits_scenes_val"]
    kept = {name: (DatasetCatalog[name], MetadataCatalog.pop(name)) for name in names}
    for name in names:
        DatasetCatalog.remove(name)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(digits, "SPEC", SPEC)
            digits.register()
            digits.register()  # twice: Detectron2 alone would raise
            for name in names:
                metadata = MetadataCatalog.get(name)
                assert metadata.thing_classes == list("0123456789")
                assert metadata.evaluator_type == "coco"
            assert not cache.exists()
            assert [len(DatasetCatalog.get(name)) for name in names] == [6, 3, 4]
            assert cache.is_dir()
    finally:
        for name, (load, metadata) in kept.items():
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)
            DatasetCatalog.register(name, load)
            MetadataCatalog[name] = metadata


def test_missing_scikit_learn_raises(cache, monkeypatch):
    """The message says what to install."""
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*scikit-learn") as error:
        digits.prepare(SPEC)
    assert error.value.name == "sklearn"


def test_missing_scikit_image_raises(cache, monkeypatch):
    """Only where its photos are needed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name)
    )
    digits.prepare(SPEC)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*scikit-image") as error:
        digits.prepare(dataclasses.replace(SPEC, more_photos=True))
    assert error.value.name == "skimage"


SPARSE = digits.SceneSpec(
    image_size=96, num_train=6, num_dev=3, num_val=4, max_side=30, min_clutter=4, max_clutter=8
)


def test_clutter_is_drawn_and_has_no_box():
    """There is ink outside the boxes of the digits."""
    ink, labels = ink_and_labels()
    rng = np.random.default_rng(3)
    for _ in range(20):
        image, objects = digits.compose_scene(rng, ink, labels, GREY, SPARSE)
        assert 1 <= len(objects) <= SPARSE.max_digits
        outside = np.ones(image.shape[:2], bool)
        for (x, y, w, h), _ in objects:
            outside[y : y + h, x : x + w] = False
        assert (image[outside] != 128).any()


def test_no_quarter_of_a_scrambled_digit_stays_in_its_place():
    digit = np.arange(64, dtype=float).reshape(8, 8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scrambled = _scramble(rng, digit)
        assert sorted(scrambled.ravel()) == sorted(digit.ravel())
        for y, x in itertools.product((0, 4), repeat=2):
            place = np.s_[y : y + 4, x : x + 4]
            assert set(scrambled[place].ravel()) != set(digit[place].ravel())


def test_scenes_without_clutter_keep_their_folder():
    """A cache of an earlier version is not written again."""
    assert digits.SPEC.digest == "6164eb64"
    assert digits.SPARSE_SPEC.digest != digits.SPEC.digest
