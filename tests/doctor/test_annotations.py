"""Annotation files: every fault is one line with the file and the place, before anything is built.

The planted faults are also given to Detectron2's own reader where it would read them.
"""

import codecs
import json
import math

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_plugin.doctor.reading import read_annotations
from retina_plugin.engine import check_config
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import detections


def encode(encoding, mark=b""):
    return lambda content: mark + json.dumps(content, ensure_ascii=False).encode(encoding)


def rename(content, name="café"):
    content["categories"][0]["name"] = name


def latin(content):
    rename(content)
    return json.dumps(content, ensure_ascii=False).encode("latin-1")


UNREADABLE = {
    "cut in half": (lambda c: json.dumps(c).encode()[:900], "is not JSON: it ends in the middle"),
    "cut in a text": (lambda c: json.dumps(c).encode()[:2], "it ends in the middle"),
    "empty": (lambda c: b"", "is empty"),
    "spaces": (lambda c: b" \n", "is empty"),
    "zeros, as after a power cut": (lambda c: b"\0" * 64, "is empty"),
    "a list": (lambda c: b"[]", "holds a list, not an object"),
    "a number": (lambda c: b"1", "holds a int, not an object"),
    "Latin-1": (latin, "is not UTF-8: byte 0xe9 in line 1"),
    "a comma too many": (lambda c: json.dumps(c).encode()[:-1] + b",}", "is not JSON: "),
    "nested too deeply": (lambda c: b'{"images": ' + b"[" * 100_000, "is not JSON"),
    "binary": (lambda c: bytes(range(256)), "is not"),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("fault", UNREADABLE)
def test_unreadable_file_raises(coco, monkeypatch, fault, fast):
    """With its name and the place, with orjson and without."""
    if not fast:
        monkeypatch.setattr("retina_plugin.doctor.reading.orjson", None)
    elif detections.orjson is None:
        pytest.skip("orjson is not installed")
    edit, text = UNREADABLE[fault]
    cfg = coco(edit)
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    line = str(error.value)
    assert line.startswith(MetadataCatalog.get("test_train").json_file)
    assert text in line and "\n" not in line


def test_missing_folder_and_rights_raise(tmp_path):
    """A folder in place of the file; a file that is not there."""
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(ConfigError, match="cannot be read: "):
            read_annotations(path)


@pytest.mark.parametrize(
    "edit",
    [
        encode("utf-8", codecs.BOM_UTF8),
        encode("utf-16"),
        encode("utf-16-le"),
        encode("utf-32"),
        encode("utf-8"),
    ],
    ids=["byte-order mark", "UTF-16", "UTF-16 without mark", "UTF-32", "UTF-8"],
)
def test_encodings_of_json_are_read(coco, found, edit):
    """By the check, and by Detectron2 through pycocotools."""

    def with_accent(content):
        rename(content)
        return edit(content)

    cfg = coco(with_accent)
    cfg.DATASETS.TEST = ()
    assert found(cfg) == ([], [])
    assert len(DatasetCatalog.get("test_train")) == 8
    assert MetadataCatalog.get("test_train").thing_classes[0] == "café"


def change(key, index=0, **values):
    """An edit that sets keys of an entry; None removes a key, ... sets None."""

    def edit(content):
        for name, value in values.items():
            if value is None:
                del content[key][index][name]
            else:
                content[key][index][name] = None if value is ... else value

    return edit


def drop(key):
    return lambda content: content.pop(key) and None


def same_id(key):
    def edit(content):
        content[key][1]["id"] = content[key][0]["id"]

    return edit


def replace(key, value):
    return lambda content: content.update({key: value})


# fault -> (what is planted, what the error says)
ERRORS = {
    "no images": (drop("images"), "has no images"),
    "empty images": (replace("images", []), "has no images: the list is empty"),
    "images are null": (replace("images", None), "has no list of images"),
    "no annotations": (drop("annotations"), "has no annotations"),
    "empty annotations": (replace("annotations", []), "has no annotations: the list is empty"),
    "no categories": (drop("categories"), "has no categories"),
    "empty categories": (replace("categories", []), "has no categories"),
    "an image is a text": (lambda c: c["images"].append("a.jpg"), "entries that are no records"),
    "image without id": (change("images", id=None), "entries of images without an id"),
    "image id null": (change("images", id=...), "entries of images without an id"),
    "image id NaN": (change("images", id=math.nan), "entries of images without an id"),
    "doubled image id": (same_id("images"), "entries of images with the id of another one"),
    "ids of two types": (change("images", id="1"), "the ids of images are numbers and texts"),
    "no file name": (change("images", file_name=None), "images without a file_name"),
    "no width": (change("images", width=None), "width or height is missing"),
    "no height": (change("images", height=None), "width or height is missing"),
    "width 0": (change("images", width=0), "width or height is missing or no whole number"),
    "width as text": (change("images", width="64"), "no whole number"),
    "width NaN": (change("images", width=math.nan), "no whole number"),
    "annotation without id": (change("annotations", id=None), "of annotations without an id"),
    "doubled annotation id": (same_id("annotations"), "of annotations with the id of another"),
    "no image_id": (change("annotations", image_id=None), "annotations without an image_id"),
    "category 99": (change("annotations", category_id=99), "category_id 99, annotation 1 of"),
    "category 0": (change("annotations", category_id=0), "none of the categories'"),
    "category as text": (change("annotations", category_id="3"), "category_id '3', annotation 1"),
    "category a list": (change("annotations", category_id=[3]), "category_id [3], annotation 1"),
    "no category": (change("annotations", category_id=None), "category_id None, annotation 1"),
    "category without id": (change("categories", id=None), "of categories without an id"),
    "doubled category id": (same_id("categories"), "of categories with the id of another one"),
    "category without name": (change("categories", name=None), "categories without a name"),
    "no bbox": (change("annotations", bbox=None), "annotations without a bbox (1 of"),
    "bbox null": (change("annotations", bbox=...), "annotations without a bbox (1 of"),
    "iscrowd null": (change("annotations", iscrowd=...), "iscrowd is neither 0 nor 1"),
    "iscrowd as text": (change("annotations", iscrowd="0"), "iscrowd is neither 0 nor 1"),
    "ignore": (change("annotations", ignore=1), '"ignore", which Detectron2 refuses'),
    "flat polygon": (change("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "segmentation"),
    "mask without size": (change("annotations", segmentation={"counts": "a"}), "segmentation"),
    "keypoints with null": (change("annotations", keypoints=[1, None, 2]), "keypoints"),
}


@pytest.mark.parametrize("fault", ERRORS)
def test_faulty_file_raises(coco, found, fault):
    """One line with the file, how many there are, and the first."""
    edit, text = ERRORS[fault]
    cfg = coco(edit)
    (first, *_), _ = found(cfg)
    assert first.startswith(MetadataCatalog.get("test_train").json_file), first
    assert text in first, first
    with pytest.raises(ConfigError, match="test_train|train.json"):
        check_config(cfg)


def test_image_and_annotation_are_named(coco, found):
    """By file name and id, with the number of faults."""

    def edit(content):
        for annotation in content["annotations"][2:5]:
            annotation["category_id"] = 77
        content["images"][1]["width"] = None

    errors, _ = found(coco(edit))
    assert any("(1 of 8, the first: 000002.png, width None, height 64)" in e for e in errors)
    (line,) = [e for e in errors if "category_id" in e]
    assert "(3 of " in line and "category_id 77, annotation 3 of 00000" in line


WARNINGS = {
    "orphan": (change("annotations", image_id=99), "annotations of an image that the file does"),
    "one name twice": (lambda c: rename(c, "1"), "categories with the name of another one"),
    "one file twice": (change("images", file_name="000002.png"), "with the file of another one"),
    "polygon of 2 points": (change("annotations", segmentation=[[1, 2, 3, 4]]), "3 points"),
}


@pytest.mark.parametrize("fault", WARNINGS)
def test_doubtful_file_gives_a_warning(coco, found, fault):
    """Detectron2 reads it, and it may be meant."""
    edit, text = WARNINGS[fault]
    cfg = coco(edit)
    cfg.DATASETS.TEST = ()
    errors, warnings = found(cfg)
    assert errors == []
    assert any(text in line for line in warnings), warnings
    check_config(cfg)
    assert DatasetCatalog.get("test_train")


GOOD = {
    "nothing": lambda c: None,
    "an image without annotation": change("images", 0, id=77),
    "gaps in the category ids": lambda c: (
        [x.update(id=10 * x["id"]) for x in c["categories"]]
        and [x.update(category_id=10 * x["category_id"]) for x in c["annotations"]]
        and None
    ),
    "categories in another order": lambda c: c["categories"].reverse(),
    "a crowd": change("annotations", iscrowd=1),
    "text ids": lambda c: (
        [x.update(id=str(x["id"])) for x in c["images"]]
        and [x.update(image_id=str(x["image_id"])) for x in c["annotations"]]
        and None
    ),
    "sizes as floats": change("images", width=64.0),
    "an empty segmentation": change("annotations", segmentation=[]),
    "a mask": change("annotations", segmentation={"counts": [0, 4096], "size": [64, 64]}),
    "polygons": change("annotations", segmentation=[[1, 1, 9, 1, 9, 9]]),
    "keypoints": change("annotations", keypoints=[1, 1, 2]),
    "no area in training": change("annotations", area=None),
    "no iscrowd": change("annotations", iscrowd=None),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_file_passes(coco, found, kind):
    """And Detectron2 reads it."""
    cfg = coco(GOOD[kind])
    errors, warnings = found(cfg)
    assert errors == [] and not [w for w in warnings if "does not have" not in w], warnings
    assert len(DatasetCatalog.get("test_train")) == 8


@pytest.mark.parametrize("value", [..., "4", math.nan, -1, math.inf], ids=str)
def test_impossible_area_in_a_test_set_raises(coco, found, value):
    """pycocotools sorts boxes into small, medium and large by it."""
    errors, _ = found(coco(change("annotations", area=value), "val"))
    (line,) = errors
    assert "annotations whose area is no number" in line and "annotation 1 of" in line


@pytest.mark.parametrize("key", ["images", "categories"])
def test_faulty_test_set_raises(coco, found, key):
    """Before the training, not after it."""
    errors, _ = found(coco(replace(key, []), "val"))
    assert any("val.json" in line and f"has no {key}" in line for line in errors)


@pytest.mark.parametrize("ids", [lambda i: i - 1, "x{}".format, lambda i: -i], ids="0 x -".split())
def test_test_set_with_odd_annotation_ids_passes(coco, found, ids):
    """The evaluation numbers annotations itself; pycocotools takes 0 for "no match"."""
    edit = lambda c: [a.update(id=ids(a["id"])) for a in c["annotations"]] and None  # noqa: E731
    assert found(coco(edit, "val")) == ([], [])


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_of_unknown_images_only_are_one_error(coco, found, split):
    """Detectron2 says "No valid data found", or AP would be NaN. The line has both kinds of id."""

    def edit(content):
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])

    cfg = coco(edit, split)
    path = MetadataCatalog.get(f"test_{split}").json_file
    content = read_annotations(path)
    errors, warnings = found(cfg)
    assert errors == [
        f"{path}: has no annotation of an image that it has ({len(content['annotations'])} "
        f"annotations, the first: image_id '1'; {len(content['images'])} images, the first: id 1): "
        "give image_id the images' ids: in both as numbers, or in both as texts"
    ]
    assert not any("they are left out" in warning for warning in warnings)
    with pytest.raises(ConfigError, match="has no annotation of an image that it has"):
        check_config(cfg)


def test_test_set_without_annotations_passes(coco, found):
    """As test-dev: the detections are written, and AP is not computed."""
    assert found(coco(drop("annotations"), "val")) == ([], [])


def test_test_set_without_boxes_gives_a_warning(coco, found):
    errors, (line,) = found(coco(replace("annotations", []), "val"))
    assert errors == [] and "has no annotations: the list is empty" in line


def test_crowds_only_raise(coco, found):
    """Nothing can be learned from them."""
    everything = lambda c: [a.update(iscrowd=1) for a in c["annotations"]] and None  # noqa: E731
    errors, _ = found(coco(everything))
    assert any("has crowd boxes only" in line for line in errors)
