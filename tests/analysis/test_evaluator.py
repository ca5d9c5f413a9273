"""ReportEvaluator: the report after each evaluation of a training."""

import json
from pathlib import Path

import torch

from retina_plugin.engine import Trainer


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
