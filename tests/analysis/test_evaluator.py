"""ReportEvaluator: the report after each evaluation of a training."""

import json
from pathlib import Path

import torch

from retina_plugin.analysis import GroundTruth, analyze
from retina_plugin.engine import Trainer
from tests.analysis.toy import dataset, detections


def test_report_stands_beside_the_metrics(tiny_cfg):
    """Its page, and the costs of errors as metrics; AP is the other evaluator's."""
    torch.manual_seed(0)
    model = Trainer.build_model(tiny_cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    tiny_cfg.TEST.EVALUATORS = ("FastCOCOEvaluator", "ReportEvaluator")
    results = Trainer.test(tiny_cfg, model)
    assert list(results) == ["bbox", "errors"]
    assert set(results["errors"]) == {"Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"}
    folder = Path(tiny_cfg.OUTPUT_DIR, "inference", tiny_cfg.DATASETS.TEST[0])
    content = json.loads((folder / "report.json").read_text())
    assert abs(content["metrics"]["AP"] - results["bbox"]["AP"]) < 1e-9
    assert (folder / "report.html").is_file()


def test_ids_of_annotations_and_boxes_of_unknown_images_do_not_matter():
    """Text ids, the id 0, and a box of an unknown image that is none."""
    coco = dataset()
    found = detections(coco)
    expected = analyze(GroundTruth.from_coco(dataset(), "test"), found).metrics
    for annotation in coco["annotations"]:
        annotation["id"] = f"x{annotation['id']}"
    coco["annotations"][0]["id"] = 0
    coco["annotations"].insert(3, {"id": "y", "image_id": "3.png", "category_id": 5, "bbox": []})
    assert analyze(GroundTruth.from_coco(coco, "test"), found).metrics == expected
