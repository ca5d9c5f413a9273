"""AP of a file beside that of the model: a file of another origin is refused."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.deploy import DenseModel, ExportedModel
from retina_plugin.deploy.check import ApComparison, check_file, check_origin, compare_ap
from retina_plugin.errors import ConfigError
from tests.deploy.conftest import NAMES
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


@pytest.fixture
def found_by_model(detector, metadata_of, tiny_digits, request):
    """found_by_model(names): a dataset of classes ``names``, whose truth is what the model finds.

    So the model has an AP. It has no json_file, as a dataset that Python code makes.
    """
    cfg, model = detector()
    mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
    records = [dict(record) for record in DatasetCatalog.get("digits_scenes_val")]
    for record in records:
        with torch.inference_mode():
            found = model([mapper(record)])[0]["instances"][:8]
        record["annotations"] = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(k), "iscrowd": 0}
            for box, k in zip(found.pred_boxes.tensor.tolist(), found.pred_classes)
        ]
    registered = []

    def register(names):
        name = f"{request.node.name}_{len(registered)}"
        order = [names.index(x) for x in NAMES]
        moved = copy.deepcopy(records)
        for record in moved:
            for annotation in record["annotations"]:
                annotation["category_id"] = order[annotation["category_id"]]
        DatasetCatalog.register(name, lambda: moved)
        MetadataCatalog.get(name).set(thing_classes=names, evaluator_type="coco")
        registered.append(name)
        return name

    yield register, cfg, model, metadata_of(cfg, model)
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _in_memory(dense, metadata):
    """A file that is the function that was exported."""

    @torch.no_grad()
    def run(images):
        return [x.numpy() for x in dense(torch.from_numpy(images))]

    return ExportedModel(Path("m.onnx"), "onnx", metadata, tuple(dense.output_names), run)


@pytest.mark.parametrize("order", [1, -1])
def test_ap_is_that_of_both_whatever_the_order_of_the_classes(found_by_model, order):
    """The dataset may have the model's classes in another order."""
    register, cfg, model, metadata = found_by_model
    dense = DenseModel(model).eval()
    found = compare_ap(cfg, model, _in_memory(dense, metadata), register(NAMES[::order]), images=3)
    assert found.images == 3 and 5 < found.model["AP"] < 100
    assert found.file == pytest.approx(found.model, nan_ok=True)


@pytest.mark.parametrize("images", [None, 2])
def test_ap_is_measured_whatever_the_evaluators_are(found_by_model, images):
    """A report has no AP, cannot be one of some images, and its files would be lost."""
    register, cfg, model, metadata = found_by_model
    cfg = cfg.clone()
    cfg.TEST.EVALUATORS = ("ReportEvaluator",)
    file = _in_memory(DenseModel(model).eval(), metadata)
    found = compare_ap(cfg, model, file, register(NAMES), images=images)
    assert list(found.model) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert 5 < found.model["AP"] < 100


def test_ap_of_another_model_differs(found_by_model):
    register, cfg, model, metadata = found_by_model
    dense = copy.deepcopy(DenseModel(model).eval())
    dense.head.bbox_pred.bias.data.add_(0.3)
    found = compare_ap(cfg, model, _in_memory(dense, metadata), register(NAMES))
    assert found.images == 4 and found.difference["AP"] < -1


def test_dataset_of_other_classes_is_refused(found_by_model):
    register, cfg, model, metadata = found_by_model
    metadata = dataclasses.replace(metadata, class_names=("cat", *NAMES[1:]))
    with pytest.raises(ConfigError, match=r"has other classes than the model, such as cat"):
        compare_ap(cfg, model, _file(metadata), register(NAMES))
