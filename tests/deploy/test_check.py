"""AP of a file beside that of the model: a file of another origin is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog

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


@pytest.mark.slow
def test_file_has_the_ap_of_its_model(exported_onnx, tmp_path, request):
    """The ground truth is what the model itself finds best, so that its AP is not 0."""
    path, cfg, model = exported_onnx
    name = request.node.name
    records = [dict(x) for x in DatasetCatalog.get("digits_scenes_val")[:6]]
    from retina_plugin.data import DATASET_MAPPER_REGISTRY

    mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
    for record in records:
        with torch.inference_mode():
            found = model([mapper(record)])[0]["instances"][:8]
        record["annotations"] = [
            {"bbox": box, "bbox_mode": 0, "category_id": int(k), "iscrowd": 0}
            for box, k in zip(found.pred_boxes.tensor.tolist(), found.pred_classes)
        ]
    from detectron2.data import MetadataCatalog

    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(map(str, range(10))), evaluator_type="coco")
    request.addfinalizer(lambda: (DatasetCatalog.remove(name), MetadataCatalog.remove(name)))
    weights = tmp_path / "weights.pth"
    names = [f"дзета {k}" for k in range(10)]
    torch.save({"model": model.state_dict(), "class_names": names}, weights)
    output = tmp_path / "check.json"
    found = check_file(path, cfg, weights, dataset=name, images=4, output=output)
    assert found.images == 4 and 5 < found.model["AP"] < 100
    assert found.file["AP"] == pytest.approx(found.model["AP"], abs=0.5)
    assert json.loads(output.read_text()) == json.loads(json.dumps(found.to_dict()))

    with torch.no_grad():  # another model: the comparison says so
        model.head.bbox_pred.bias.add_(0.1)
    try:
        other = compare_ap(cfg, model, _loaded(path), name, images=4)
    finally:
        with torch.no_grad():
            model.head.bbox_pred.bias.sub_(0.1)
    assert abs(other.difference["AP"]) > 1


def _loaded(path):
    from retina_plugin.deploy import load_exported

    return load_exported(path)
