"""The embedded digits: disjoint splits, reproducible scenes, COCO format, tight boxes."""

import itertools
import json
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from sklearn.datasets import load_digits

from retina_plugin.data import digits

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


def test_interrupted_prepare_leaves_no_folder(cache, monkeypatch):
    """The folder appears completely or not at all: here the disk is full in the middle."""
    write = cv2.imwrite

    def full_disk(path, image):
        return "train" not in path and write(path, image)

    monkeypatch.setattr(cv2, "imwrite", full_disk)
    with pytest.raises(OSError, match="cannot write"):
        digits.prepare(SPEC)
    assert list(cache.iterdir()) == []


def test_two_processes_may_prepare_at_once(cache, monkeypatch):
    """The slower one uses the other's folder and removes its own."""
    write = cv2.imwrite
    root = digits.dataset_root(SPEC)

    def other_is_faster(path, image):
        if "train" in path and not root.is_dir():
            root.mkdir()
            (root / "by_the_other_process").touch()
        return write(path, image)

    monkeypatch.setattr(cv2, "imwrite", other_is_faster)
    assert digits.prepare(SPEC) == root
    assert [path.name for path in cache.iterdir()] == [root.name]
    assert (root / "by_the_other_process").is_file()


def test_registered_datasets_are_written_on_first_use(cache, monkeypatch):
    """Registering writes no file, loading does. The metadata has the ten classes."""
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
