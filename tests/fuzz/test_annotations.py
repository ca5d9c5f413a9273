"""Annotation files: one line, or boxes that are right in training and in evaluation."""

import json
import math
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.data import FastMapper
from retina_plugin.doctor import raise_errors
from retina_plugin.doctor.datasets import check_datasets
from retina_plugin.evaluation import build_evaluators
from tests.fuzz.counting import fuzz
from tests.fuzz.mutation import (
    JUNK,
    any_bytes,
    damaged_bytes,
    damaged_tree,
    randoms,
    read_or_one_line,
)

NAME = "fuzz_annotations"


@pytest.fixture(scope="module")
def folder(tiny_digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("annotations")
    shutil.copytree(tiny_digits / "val", root / "images")
    return root


@pytest.fixture(scope="module")
def content(tiny_digits):
    """Three images with a few boxes, a crowd and a polygon."""
    coco = json.loads((tiny_digits / "val.json").read_text())
    coco["images"] = coco["images"][:3]
    ids = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    coco["annotations"][0]["iscrowd"] = 1
    coco["annotations"][1]["segmentation"] = [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0]]
    return coco


@pytest.fixture
def check(folder, tiny_cfg, log):
    """``check(data)``: the quick checks of a file, then all that training and evaluation read."""
    path = folder / "file.json"
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = (NAME,)
    mappers = [FastMapper(**FastMapper.from_config(tiny_cfg, train)) for train in (True, False)]

    def load():
        raise_errors(check_datasets(tiny_cfg))
        records = DatasetCatalog.get(NAME)
        return records, [[mapper(record) for record in records] for mapper in mappers]

    def run(data):
        log.clear()
        path.write_bytes(data)
        register_coco_instances(NAME, {}, str(path), str(folder / "images"))
        try:
            loaded = read_or_one_line(load)
            if loaded is not None:
                records, (training, _) = loaded
                warned = " ".join(r.message for r in log.records if r.levelname == "WARNING")
                assert_right(
                    json.loads(data.decode(json.detect_encoding(data))),
                    records,
                    training,
                    tiny_cfg,
                    warned,
                )
                assert_evaluated(tiny_cfg, records, folder)
        finally:
            DatasetCatalog.remove(NAME)
            MetadataCatalog.pop(NAME, None)

    return run


def assert_right(content, records, training, cfg, warned):
    """Every image and every box of the file is there, in its place, or a warning said why not."""
    assert len(records) == len(content["images"])
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes = {image_id: 0 for image_id in sizes}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd", 0) and annotation["image_id"] in boxes:
            x, y, w, h = annotation["bbox"]
            width, height = sizes[annotation["image_id"]]
            inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
            boxes[annotation["image_id"]] += inside
    for record, mapped in zip(records, training):
        instances = mapped["instances"]
        box = instances.gt_boxes.tensor
        height, width = mapped["image"].shape[1:]
        assert box.isfinite().all() and (box >= 0).all()
        assert (box[:, 0::2] <= width).all() and (box[:, 1::2] <= height).all()
        assert ((instances.gt_classes >= 0) & (instances.gt_classes < 10)).all()
        missing = boxes[record["image_id"]] - len(instances)
        assert missing == 0 or warned, f"{missing} boxes are lost without a word"


def assert_evaluated(cfg, records, folder):
    """Perfect detections are scored without an error."""
    evaluator = build_evaluators(cfg, NAME, str(folder / "output"))
    evaluator.reset()
    results = evaluator.evaluate()
    assert "bbox" in results or not results


def dumped(tree):
    return json.dumps(tree).encode("utf-8", "replace")


@fuzz(30, rng=randoms())
def test_damaged_keys_and_values(content, check, rng):
    """Keys are dropped, renamed and swapped; values become others, of other types."""
    check(dumped(damaged_tree(content, rng)))


@fuzz(20, rng=randoms())
def test_damaged_annotations(content, check, rng):
    """Only the boxes and ids, where most files are wrong; several at once."""
    numbers = [math.nan, math.inf, -math.inf, 1e30, -1, 0, 63.5, 64, 1e-9, "12", None, [1], 10**30]
    tree = json.loads(json.dumps(content))
    for annotation in rng.sample(tree["annotations"], rng.randint(1, 3)):
        key = rng.choice("bbox bbox bbox category_id image_id iscrowd area id".split())
        if key == "bbox":
            annotation["bbox"][rng.randrange(4)] = rng.choice(numbers)
        else:
            annotation[key] = rng.choice([*numbers, *JUNK])
    check(dumped(tree))


@fuzz(20, rng=randoms())
def test_damaged_bytes(content, check, rng):
    """Cut, flipped, doubled; with marks of other encodings."""
    text = json.dumps(content, indent=rng.choice([None, 1]))
    data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16"]))
    check(damaged_bytes(data, rng, [b"NaN", b"1e999", b"[" * 2000, b"{}", b",", b'"', b"\\u0000"]))


@fuzz(10, data=any_bytes())
def test_random_bytes(check, data):
    check(data)
