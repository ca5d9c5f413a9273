"""The embedded set: split before composing, deterministic, COCO format, boxes of the ink."""

import itertools
import json
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from retina_plugin.data import digits

SPEC = digits.SceneSpec(image_size=96, num_train=6, num_dev=3, num_val=4, max_side=50)
GREY = [np.full((96, 96, 3), 128, np.uint8)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The folder with the scenes of SPEC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return digits.prepare(SPEC)


@pytest.fixture(scope="module")
def grey_scenes():
    """Scenes over an even grey, where every changed pixel is ink."""
    ink, labels, _ = digits._sources()
    rng = np.random.default_rng(3)
    return [digits.compose_scene(rng, ink, labels, GREY, SPEC) for _ in range(40)]


def read(root, split):
    return json.loads((root / f"{split}.json").read_text())


def test_no_digit_is_in_two_splits(cache, monkeypatch):
    """What train, dev and val draw from share no digit, and together are all of them."""
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
    everything, labels, _ = digits._sources()
    assert sorted(val + train + dev) == sorted(digit.tobytes() for digit in everything)
    assert set(labels) == set(range(10))


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    """Two caches get the same files; another seed gives other scenes."""
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
    assert first == second
    assert len(first) == SPEC.num_train + SPEC.num_dev + SPEC.num_val + 3
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_folder_depends_on_the_whole_spec(cache):
    """Every field changes the folder, so no stale scenes are read."""
    base = vars(SPEC)
    folders = {digits.dataset_root(SPEC)}
    for field, value in base.items():
        folders.add(digits.dataset_root(digits.SceneSpec(**{**base, field: value + 1})))
    assert len(folders) == len(base) + 1
    assert {folder.parent for folder in folders} == {cache}


def test_val_does_not_depend_on_the_size_of_train(scenes, cache):
    """Results on val stay comparable when train and dev grow."""
    more = {"num_train": SPEC.num_train + 1, "num_dev": SPEC.num_dev + 1}
    larger = digits.prepare(digits.SceneSpec(**{**vars(SPEC), **more}))
    assert (larger / "val.json").read_bytes() == (scenes / "val.json").read_bytes()
    for image in (scenes / "val").iterdir():
        assert (larger / "val" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize(("split", "num_images"), [("train", 6), ("dev", 3), ("val", 4)])
def test_coco_format(scenes, split, num_images):
    """Unique ids, none 0; boxes inside the image, with their area; pictures of the stated size."""
    coco = read(scenes, split)
    assert [c["id"] for c in coco["categories"]] == list(range(1, 11))
    assert [c["name"] for c in coco["categories"]] == list("0123456789")
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["images"]) == num_images
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) >= 1
    assert {a["image_id"] for a in coco["annotations"]} == set(images)  # none is empty
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        image = images[a["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        assert a["area"] == w * h > 0
        assert a["iscrowd"] == 0 and 1 <= a["category_id"] <= 10
    for image in images.values():
        pixels = cv2.imread(str(scenes / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)


def test_detectron2_reads_it(scenes):
    """Detectron2's loader finds every image and annotation, classes from 0."""
    name = "digits_test_detectron2_reads_it"
    records = load_coco_json(str(scenes / "val.json"), str(scenes / "val"), name)
    coco = read(scenes, "val")
    assert len(records) == len(coco["images"])
    classes = [a["category_id"] for record in records for a in record["annotations"]]
    assert sorted(classes) == sorted(a["category_id"] - 1 for a in coco["annotations"])
    MetadataCatalog.pop(name)


def test_number_size_and_overlap_of_the_digits(grey_scenes):
    """Within the limits of the spec, in every scene."""
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


def test_boxes_are_the_ink(grey_scenes):
    """No pixel changes outside the boxes, and the ink reaches each side of its box."""
    assert any(len(objects) == 1 for _, objects in grey_scenes)
    for image, objects in grey_scenes:
        changed = (image != 128).any(axis=2)
        outside = changed.copy()
        for (x, y, w, h), _ in objects:
            outside[y : y + h, x : x + w] = False
        assert not outside.any()
        if len(objects) > 1:
            continue  # a neighbour's ink may lie in the box
        (((x, y, w, h), _),) = objects
        ys, xs = np.where(changed)
        slack = 1 + 0.05 * max(w, h)  # the faint rim of the ink
        assert xs.min() - x <= slack and x + w - 1 - xs.max() <= slack
        assert ys.min() - y <= slack and y + h - 1 - ys.max() <= slack


def test_digits_can_be_seen(grey_scenes):
    """Ink differs from what it covers by the contrast of the spec."""
    brightness = np.array([0.114, 0.587, 0.299])  # of BGR
    for image, objects in grey_scenes:
        grey = image @ brightness
        for (x, y, w, h), _ in objects:
            # 128 is both a limit of integers and the background: 1 grey level of rounding
            assert abs(grey[y : y + h, x : x + w] - 128).max() >= SPEC.min_contrast - 1


def test_classes_are_those_of_the_digits_drawn():
    """Drawn only from the sevens, a scene has only sevens; the shapes are the digits'."""
    ink, labels, _ = digits._sources()
    sevens = ink[labels == 7]
    rng = np.random.default_rng(0)
    for _ in range(10):
        _, objects = digits.compose_scene(rng, sevens, np.full(len(sevens), 7), GREY, SPEC)
        assert {label for _, label in objects} == {7}
    # a digit that is one vertical stroke keeps its shape: ink where the digit has ink
    stroke = np.zeros((1, 8, 8))
    stroke[0, 1:7, 4] = 1
    _, objects = digits.compose_scene(rng, stroke, np.array([1]), GREY, SPEC)
    assert all(h > 3 * w and label == 1 for (_, _, w, h), label in objects)


def test_prepare_writes_once(cache, monkeypatch):
    """The second call finds the folder and composes nothing."""
    root = digits.prepare(SPEC)
    assert root.parent == cache

    def fail(*args):
        raise AssertionError("composed again")

    monkeypatch.setattr(digits, "compose_scene", fail)
    assert digits.prepare(SPEC) == root


def test_an_interrupted_prepare_leaves_nothing(cache, monkeypatch):
    """The folder appears whole or not at all."""
    write = digits._write_coco

    def full_disk(root, split, scenes):
        write(root, split, scenes)
        if split == "train":
            raise OSError("no space left")

    monkeypatch.setattr(digits, "_write_coco", full_disk)
    with pytest.raises(OSError, match="no space left"):
        digits.prepare(SPEC)
    assert list(cache.iterdir()) == []


def test_two_processes_may_prepare_at_once(cache, monkeypatch):
    """The one that comes second uses the other's folder and cleans up its own."""
    write = digits._write_coco
    root = digits.dataset_root(SPEC)

    def other_is_faster(partial, split, scenes):
        write(partial, split, scenes)
        if split == "train":
            root.mkdir()
            (root / "by_the_other").touch()

    monkeypatch.setattr(digits, "_write_coco", other_is_faster)
    assert digits.prepare(SPEC) == root
    assert [path.name for path in cache.iterdir()] == [root.name]
    assert (root / "by_the_other").is_file()


def test_registered_and_written_on_first_use(cache, monkeypatch):
    """Registering writes nothing; asking for the data does; the metadata has the ten classes."""
    names = ["digits_scenes_train", "digits_scenes_dev", "digits_scenes_val"]
    kept = {name: (DatasetCatalog[name], MetadataCatalog.pop(name)) for name in names}
    for name in names:
        DatasetCatalog.remove(name)
    try:
        with monkeypatch.context() as patch:
            dataset_root, prepare = digits.dataset_root, digits.prepare
            patch.setattr(digits, "dataset_root", lambda spec=SPEC: dataset_root(spec))
            patch.setattr(digits, "prepare", lambda spec=SPEC: prepare(spec))
            digits.register()
            digits.register()  # again: Detectron2 would assert
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


def test_without_scikit_learn(cache, monkeypatch):
    """The message names what to install."""
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*scikit-learn") as error:
        digits.prepare(SPEC)
    assert error.value.name == "sklearn"
