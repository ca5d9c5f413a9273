"""COCO's metrics, the results file, and how TEST.EVALUATORS chooses evaluators."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.engine import Trainer, check_config, setup_cfg
from retina_plugin.engine.report import metrics_by_dataset
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import (
    EVALUATOR_REGISTRY,
    COCOEvaluator,
    FastCOCOEvaluator,
    build_evaluators,
    coco,
)

NAME = "test_evaluator_boxes"
CATEGORIES = [3, 7, 90]  # not contiguous, as COCO's
SIZE = 400
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def ground_truth():
    """COCO annotations: 8 images, each with a small, a medium and a large box."""
    annotations = []
    for image in range(1, 9):
        for side in (20, 60, 150):
            x = 20 * image
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": CATEGORIES[len(annotations) * 7 % 5 % 3],
                    "bbox": [x, side, side, side + 10],
                    "area": side * (side + 10),
                    "iscrowd": 0,
                }
            )
    return annotations


@pytest.fixture(params=[True])
def dataset(request, tmp_path):
    """Name of the registered dataset; parametrize with False for one without annotations."""
    contents = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(1, 9)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORIES],
    }
    if request.param:
        contents["annotations"] = ground_truth()
    (tmp_path / "set.json").write_text(json.dumps(contents))
    register_coco_instances(NAME, {}, str(tmp_path / "set.json"), str(tmp_path))
    DatasetCatalog.get(NAME)  # this fills the metadata, as building a loader does
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def detections(annotations, scores, shift=0.0, class_shift=0):
    """What ``process`` takes: inputs and outputs of all 8 images."""
    inputs, outputs = [], []
    for image in range(1, 9):
        found = [(a, s) for a, s in zip(annotations, scores, strict=True) if a["image_id"] == image]
        xywh = torch.tensor([a["bbox"] for a, _ in found]).view(-1, 4).float() + shift
        classes = [(CATEGORIES.index(a["category_id"]) + class_shift) % 3 for a, _ in found]
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)),
            scores=torch.tensor([s for _, s in found]),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
        )
        inputs.append({"image_id": image})
        outputs.append({"instances": instances})
    return inputs, outputs


@pytest.fixture(params=["COCOEvaluator", "FastCOCOEvaluator", "FastCOCOEvaluator, no extras"])
def evaluate(request, monkeypatch):
    """evaluate(dataset, folder, inputs, outputs) -> results, for each evaluator."""
    if request.param.endswith("no extras"):
        monkeypatch.setattr(coco, "hotcoco", None)
        monkeypatch.setattr("retina_plugin.evaluation.detections.orjson", None)
    cls = EVALUATOR_REGISTRY.get(request.param.partition(",")[0])

    def run(dataset, out, inputs, outputs):
        evaluator = cls(**cls.from_config(None, dataset, str(out)))
        evaluator.reset()
        evaluator.process(inputs, outputs)
        return evaluator.evaluate()

    return run


def test_perfect_detections_have_ap_100(dataset, tmp_path, evaluate):
    """At every threshold, size and class."""
    annotations = ground_truth()
    results = evaluate(dataset, tmp_path, *detections(annotations, [0.9] * len(annotations)))
    expected = {f"AP-class {c}": 100.0 for c in CATEGORIES} | dict.fromkeys(METRICS, 100.0)
    assert results["bbox"] == pytest.approx(expected, abs=1e-9)


def test_wrong_classes_have_ap_0(dataset, tmp_path, evaluate):
    """Perfect boxes do not count if their class is wrong."""
    annotations = ground_truth()
    wrong = detections(annotations, [0.9] * len(annotations), class_shift=1)
    assert evaluate(dataset, tmp_path, *wrong)["bbox"]["AP"] == 0.0


def test_metrics_equal_pycocotools(dataset, tmp_path, evaluate):
    """pycocotools gives the same six numbers for the file that the evaluator wrote."""
    rng = np.random.default_rng(0)
    kept = [a for a in ground_truth() if rng.random() < 0.8]  # the others are missed
    noisy = kept + [{**a, "category_id": 3} for a in kept[::3]]  # duplicates, false positives
    noisy = [{**a, "bbox": [v + rng.normal(0, 3) for v in a["bbox"]]} for a in noisy]
    results = evaluate(dataset, tmp_path, *detections(noisy, rng.random(len(noisy)).tolist()))
    truth = COCO(str(tmp_path / "set.json"))
    direct = COCOeval(truth, truth.loadRes(str(tmp_path / "coco_instances_results.json")), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    values = [results["bbox"][metric] for metric in METRICS]
    assert values == pytest.approx((100 * direct.stats[:6]).tolist(), abs=1e-9)
    assert 5 < values[0] < 95 and len(set(values)) == 6  # not trivial


@pytest.mark.parametrize("dataset", [False], indirect=True)
def test_dataset_without_annotations_writes_only_the_file(dataset, tmp_path, evaluate):
    """As for test-dev: the file to submit has COCO's category ids and XYWH boxes."""
    annotations = ground_truth()
    scores = [0.01 * (i + 1) for i in range(len(annotations))]
    assert evaluate(dataset, tmp_path, *detections(annotations, scores)) == {}
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(written) == len(annotations)
    for result, annotation, score in zip(written, annotations, scores, strict=True):
        assert result["image_id"] == annotation["image_id"]
        assert result["category_id"] == annotation["category_id"]
        assert result["bbox"] == pytest.approx(annotation["bbox"])
        assert result["score"] == pytest.approx(score)


@pytest.mark.parametrize("dataset", [True, False], indirect=True)
def test_no_detections_at_all(dataset, tmp_path, evaluate):
    """An untrained model: the file is empty and every metric is NaN, without an exception."""
    results = evaluate(dataset, tmp_path, *detections([], []))
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    assert all(np.isnan(value) for value in results.get("bbox", {}).values())


def test_trainer_builds_the_evaluator_of_the_config(tiny_cfg):
    """TEST.EVALUATORS names it. It gets the dataset's name and a folder for this dataset."""

    class MyEvaluator(DatasetEvaluator):
        def __init__(self, **kwargs):
            self.kwargs = kwargs

        @classmethod
        def from_config(cls, cfg, dataset_name, output_dir):
            return {"dataset_name": dataset_name, "output_dir": output_dir}

    default = Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")
    assert isinstance(default, FastCOCOEvaluator)
    tiny_cfg.TEST.EVALUATORS = ("COCOEvaluator",)
    assert isinstance(Trainer.build_evaluator(tiny_cfg, "digits_scenes_val"), COCOEvaluator)
    EVALUATOR_REGISTRY.register(MyEvaluator)
    try:
        tiny_cfg.TEST.EVALUATORS = ("MyEvaluator",)
        evaluator = Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")
    finally:
        EVALUATOR_REGISTRY._obj_map.pop("MyEvaluator")
    assert isinstance(evaluator, MyEvaluator)
    assert evaluator.kwargs == {
        "dataset_name": "digits_scenes_val",
        "output_dir": f"{tiny_cfg.OUTPUT_DIR}/inference/digits_scenes_val",
    }


class Counting(DatasetEvaluator):
    """Counts images and detections."""

    def __init__(self, key):
        self.key = key

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return {self.key: {"images": self.images}}


@pytest.fixture
def registered():
    """Registers a class under a name for the time of a test."""
    names = []

    def register(name, key):
        cls = type(name, (Counting,), {"from_config": staticmethod(lambda *_: {"key": key})})
        EVALUATOR_REGISTRY.register(cls)
        names.append(name)

    yield register
    for name in names:
        EVALUATOR_REGISTRY._obj_map.pop(name)


def test_evaluators_share_one_pass(tiny_cfg, registered):
    """Each sees every image once, and the results stand side by side."""
    registered("MyEvaluator", "mine")
    tiny_cfg.TEST.EVALUATORS = ("FastCOCOEvaluator", "MyEvaluator")
    results = Trainer.test(tiny_cfg, Trainer.build_model(tiny_cfg))
    assert list(results) == ["bbox", "mine"]
    assert results["mine"] == {"images": len(DatasetCatalog.get(tiny_cfg.DATASETS.TEST[0]))}
    found = metrics_by_dataset(tiny_cfg, results)[tiny_cfg.DATASETS.TEST[0]]
    assert {"bbox AP", "mine images"} <= found.keys()


def test_results_of_the_same_name_are_both_kept(tiny_cfg, registered, caplog):
    registered("First", "mine")
    registered("Second", "mine")
    tiny_cfg.TEST.EVALUATORS = ("First", "Second")
    evaluator = build_evaluators(tiny_cfg, "digits_scenes_val", "unused")
    for _ in range(2):
        evaluator.reset()
        evaluator.process([{}], [{}])
        with caplog.at_level(logging.WARNING, "retina_plugin"):
            results = evaluator.evaluate()
    assert results == {"mine": {"images": 1}, "mine_Second": {"images": 1}}
    assert caplog.text.count("results named mine") == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"must be a list of at least one name, each once, got \(\)"),
        (("FastCOCOEvaluator",) * 2, "each once"),
        ("FastCOCOEvaluator", "must be a list"),
        (("CocoEvaluator",), "unknown 'CocoEvaluator'.*known: COCOEvaluator"),
    ],
)
def test_bad_lists_are_found_before_the_training(tiny_cfg, names, message):
    tiny_cfg.TEST.EVALUATORS = names
    with pytest.raises(ConfigError, match=rf"TEST\.EVALUATORS:? .*{message}"):
        check_config(tiny_cfg)


def test_missing_package_of_an_evaluator_is_found_before_the_training(tiny_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    tiny_cfg.TEST.EVALUATORS = ("FastCOCOEvaluator", "ReportEvaluator")
    with pytest.raises(ConfigError, match=r"ReportEvaluator needs plotly"):
        check_config(tiny_cfg)


def test_the_key_of_one_evaluator_says_what_to_write(tmp_path):
    (tmp_path / "old.yaml").write_text('TEST: {EVALUATOR: "COCOEvaluator"}')
    with pytest.raises(ConfigError, match=r"TEST\.EVALUATOR no longer exists: .*EVALUATORS"):
        setup_cfg(str(tmp_path / "old.yaml"))


def test_unknown_evaluator_raises(tiny_cfg):
    """One line that lists the known ones."""
    tiny_cfg.TEST.EVALUATORS = ("CocoEvaluator",)
    with pytest.raises(ConfigError, match=r"TEST\.EVALUATORS: .*'CocoEvaluator'.*COCOEvaluator"):
        Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")


def records_in_detectron2_format():
    """:func:`ground_truth` as Detectron2's records; one box is a crowd."""
    records = []
    for image in range(1, 9):
        record = {"image_id": image, "file_name": f"{image}.png", "height": SIZE, "width": SIZE}
        record["annotations"] = [
            {
                "bbox": a["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": CATEGORIES.index(a["category_id"]),
                "iscrowd": int(a["id"] == 5),
            }
            for a in ground_truth()
            if a["image_id"] == image
        ]
        records.append(record)
    return records


def test_dataset_without_a_coco_file(tmp_path, caplog):
    """A dataset in Detectron2's format: the metrics equal COCOEvaluator's."""
    DatasetCatalog.register(NAME, records_in_detectron2_format)
    MetadataCatalog.get(NAME).set(thing_classes=[f"class {c}" for c in CATEGORIES])
    caplog.set_level("DEBUG", "retina_plugin")
    annotations = ground_truth()[::2]
    shifted = detections(annotations, np.linspace(0.1, 1, len(annotations)).tolist(), shift=2.0)
    results = []
    try:
        for cls in (FastCOCOEvaluator, COCOEvaluator):
            evaluator = cls(**cls.from_config(None, NAME, str(tmp_path)))
            evaluator.reset()
            evaluator.process(*shifted)
            results.append(evaluator.evaluate()["bbox"])
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME)
    assert results[0] == results[1] and 5 < results[0]["AP"] < 95
    assert f"Evaluating with {'hotcoco' if coco.hotcoco else 'pycocotools'}" in caplog.text
