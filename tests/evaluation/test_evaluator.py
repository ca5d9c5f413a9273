"""COCO's numbers, the results file, and evaluators of one's own."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.engine import Trainer
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import EVALUATOR_REGISTRY, COCOEvaluator, FastCOCOEvaluator, coco

NAME = "test_evaluator_boxes"
CATEGORIES = [3, 7, 90]  # not contiguous, as COCO's
SIZE = 400
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def ground_truth():
    """8 images with a small, a medium and a large box of changing classes."""
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
    """The registered name of the boxes; parametrize with False for a set without annotations."""
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
    DatasetCatalog.get(NAME)  # fills the metadata, as building a loader does
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def detections(annotations, scores, shift=0.0, class_shift=0):
    """(inputs, outputs) as the evaluation loop has them; all 8 images, in their order."""
    inputs, outputs = [], []
    for image in range(1, 9):
        mine = [(a, s) for a, s in zip(annotations, scores, strict=True) if a["image_id"] == image]
        xywh = torch.tensor([a["bbox"] for a, _ in mine]).view(-1, 4).float() + shift
        classes = [(CATEGORIES.index(a["category_id"]) + class_shift) % 3 for a, _ in mine]
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)),
            scores=torch.tensor([s for _, s in mine]),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
        )
        inputs.append({"image_id": image})
        outputs.append({"instances": instances})
    return inputs, outputs


@pytest.fixture(params=["COCOEvaluator", "FastCOCOEvaluator", "FastCOCOEvaluator, nothing fast"])
def evaluate(request, monkeypatch):
    """evaluate(dataset, folder, inputs, outputs) -> results, by each evaluator."""
    if request.param.endswith("nothing fast"):
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
    """Over all thresholds, sizes and classes."""
    annotations = ground_truth()
    results = evaluate(dataset, tmp_path, *detections(annotations, [0.9] * len(annotations)))
    expected = {f"AP-class {c}": 100.0 for c in CATEGORIES} | dict.fromkeys(METRICS, 100.0)
    assert results["bbox"] == pytest.approx(expected, abs=1e-9)


def test_wrong_classes_have_ap_0(dataset, tmp_path, evaluate):
    """Perfect boxes of the next class count nothing."""
    annotations = ground_truth()
    found = detections(annotations, [0.9] * len(annotations), class_shift=1)
    assert evaluate(dataset, tmp_path, *found)["bbox"]["AP"] == 0.0


def test_numbers_are_those_of_pycocotools(dataset, tmp_path, evaluate):
    """Run directly on the file that was written, it gives the same six numbers."""
    rng = np.random.default_rng(0)
    kept = [a for a in ground_truth() if rng.random() < 0.8]  # misses
    noisy = kept + [{**a, "category_id": 3} for a in kept[::3]]  # doubles, false alarms
    noisy = [{**a, "bbox": [v + rng.normal(0, 3) for v in a["bbox"]]} for a in noisy]
    results = evaluate(dataset, tmp_path, *detections(noisy, rng.random(len(noisy)).tolist()))
    truth = COCO(str(tmp_path / "set.json"))
    direct = COCOeval(truth, truth.loadRes(str(tmp_path / "coco_instances_results.json")), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    values = [results["bbox"][metric] for metric in METRICS]
    assert values == pytest.approx((100 * direct.stats[:6]).tolist(), abs=1e-9)
    assert 5 < values[0] < 95 and len(set(values)) == 6  # neither trivial nor all the same


@pytest.mark.parametrize("dataset", [False], indirect=True)
def test_without_annotations_the_file_is_the_result(dataset, tmp_path, evaluate):
    """As on test-dev: what is to be submitted is written, with COCO's category ids and XYWH."""
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
    """An untrained model: an empty file, no exception, and no AP that could be taken for one."""
    results = evaluate(dataset, tmp_path, *detections([], []))
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    assert all(np.isnan(value) for value in results.get("bbox", {}).values())


def test_the_trainer_takes_the_evaluator_that_is_named(tiny_cfg):
    """TEST.EVALUATOR names it; it gets the set's name and a folder of its own."""

    class Mine(DatasetEvaluator):
        def __init__(self, **kwargs):
            self.kwargs = kwargs

        @classmethod
        def from_config(cls, cfg, dataset_name, output_dir):
            return {"dataset_name": dataset_name, "output_dir": output_dir}

    default = Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")
    assert isinstance(default, FastCOCOEvaluator)
    tiny_cfg.TEST.EVALUATOR = "COCOEvaluator"
    assert isinstance(Trainer.build_evaluator(tiny_cfg, "digits_scenes_val"), COCOEvaluator)
    EVALUATOR_REGISTRY.register(Mine)
    try:
        tiny_cfg.TEST.EVALUATOR = "Mine"
        evaluator = Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")
    finally:
        EVALUATOR_REGISTRY._obj_map.pop("Mine")
    assert isinstance(evaluator, Mine)
    assert evaluator.kwargs == {
        "dataset_name": "digits_scenes_val",
        "output_dir": f"{tiny_cfg.OUTPUT_DIR}/inference/digits_scenes_val",
    }


def test_an_evaluator_that_does_not_exist(tiny_cfg):
    """One line that lists the ones that do."""
    tiny_cfg.TEST.EVALUATOR = "CocoEvaluator"
    with pytest.raises(ConfigError, match=r"TEST\.EVALUATOR: .*'CocoEvaluator'.*COCOEvaluator"):
        Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")


def boxes_in_detectron2s_format():
    """The records of :func:`ground_truth`, with one crowd."""
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


def test_a_dataset_in_detectron2s_format(tmp_path, caplog):
    """Registered without a COCO file: pycocotools' numbers, by hotcoco where it is installed."""
    DatasetCatalog.register(NAME, boxes_in_detectron2s_format)
    MetadataCatalog.get(NAME).set(thing_classes=[f"class {c}" for c in CATEGORIES])
    caplog.set_level("DEBUG", "retina_plugin")
    annotations = ground_truth()[::2]
    found = detections(annotations, np.linspace(0.1, 1, len(annotations)).tolist(), shift=2.0)
    results = []
    try:
        for cls in (FastCOCOEvaluator, COCOEvaluator):
            evaluator = cls(**cls.from_config(None, NAME, str(tmp_path)))
            evaluator.reset()
            evaluator.process(*found)
            results.append(evaluator.evaluate()["bbox"])
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME)
    assert results[0] == results[1] and 5 < results[0]["AP"] < 95
    assert f"Evaluating with {'hotcoco' if coco.hotcoco else 'pycocotools'}" in caplog.text
