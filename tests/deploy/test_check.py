"""AP of a file beside that of the model: a file of another origin is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from retina_plugin.deploy import ExportedModel
from retina_plugin.deploy.check import ApComparison, check_file, check_origin, compare_ap
from retina_plugin.errors import ConfigError
from tests.deploy.small import write_small

FOUND = ApComparison(
    "some_val",
    20,
    {"AP": 40.0, "APs": 30.5, "APl": math.nan},
    {"AP": 39.75, "APs": 31.0, "APl": math.nan},
    30.0,
    10.0,
)


def test_table_and_json_have_both_and_the_difference():
    lines = [line.split() for line in FOUND.table().splitlines()]
    assert lines == [
        ["AP", "APs", "APl", "ms"],
        ["model", "40.00", "30.50", "-", "30.0"],
        ["file", "39.75", "31.00", "-", "10.0"],
        ["difference", "-0.25", "+0.50", "-", "3.00x"],
    ]
    content = json.loads(json.dumps(FOUND.to_dict(), allow_nan=False))
    assert content["difference"] == {"AP": -0.25, "APs": 0.5, "APl": None}
    assert (content["dataset"], content["images"], content["file_ms"]) == ("some_val", 20, 10.0)


@pytest.fixture(scope="module")
def metadata(detector, metadata_of):
    return metadata_of(*detector())


def _file(metadata):
    return ExportedModel(Path("m.onnx"), "onnx", metadata, (), lambda images: [])


def test_quantized_file_has_the_same_origin(metadata):
    made = dataclasses.replace(metadata, quantized="int8", made_by="another version")
    check_origin(_file(made), metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("cat", "dog")}, r"m.onnx detects 2 classes \(cat, dog\), the .* 10 cl"),
        ({"weights_digest": "0"}, "m.onnx was made of other weights: check it with those"),
        (
            {"config_digest": "0", "score_thresh": 0.3},
            r"another config \(score_thresh 0.3 is 0.05 in the config\)",
        ),
        ({"config_digest": "0"}, r"another config \(another key of MODEL, INPUT or TEST differs\)"),
    ],
)
def test_file_of_another_origin_is_refused(metadata, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_origin(_file(dataclasses.replace(metadata, **changes)), metadata)


def test_file_without_detections_is_refused(metadata, tmp_path):
    file = write_small(tmp_path / "m.onnx", dataclasses.replace(metadata, stage="head"))
    with pytest.raises(ConfigError, match=r"m.onnx has the output stage head: AP is that of det"):
        check_file(file, "unused.yaml")


@pytest.mark.parametrize(
    ("dataset", "images", "message"),
    [
        ("digits_scenes_va", None, r"no dataset 'digits_scenes_va'.*did you mean 'digits_scenes_v"),
        ("coco_2017_val", None, r"coco_2017_val has no json_file at .*put COCO under"),
        ("digits_scenes_val", 0, "images 0: give 1 or more"),
    ],
)
def test_dataset_that_cannot_be_used_is_named(detector, metadata, dataset, images, message):
    cfg, model = detector()
    with pytest.raises(ConfigError, match=message):
        compare_ap(cfg, model, _file(metadata), dataset, images=images)
