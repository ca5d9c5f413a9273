"""`retina report`."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from retina_plugin.cli import main as retina
from retina_plugin.engine import setup_cfg


@pytest.fixture
def weights(tiny_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = setup_cfg("quick/digits_R18.yaml", ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    torch.save({"model": model.state_dict()}, "net.pth")
    return ["--config-file", "quick/digits_R18.yaml", "--weights", "net.pth"]


def test_of_a_model_and_of_its_predictions(weights, capsys):
    """The same numbers from a model and from the file of detections that it wrote."""
    retina(["report", *weights, "--output", "out"])
    found = Path("out", "coco_instances_results.json")
    again = ["report", "--dataset", "digits_scenes_val", "--predictions", str(found)]
    retina([*again, "--against", str(found), "--output", "again"])
    printed = capsys.readouterr().out
    assert "AP +0.0 (95 % interval +0.0 to +0.0)" in printed
    first, second = (json.loads(Path(x, "report.json").read_text()) for x in ("out", "again"))
    assert first["metrics"] == second["metrics"] and first["detections"] > 0
    assert Path("again", "report.html").is_file()


def test_detections_to_compare_with_are_not_replaced(weights):
    """Else the model would be compared with itself."""
    Path("out").mkdir()
    earlier = Path("out", "coco_instances_results.json")
    earlier.write_text("[]")
    against = ["--against", str(earlier.resolve())]
    with pytest.raises(SystemExit, match="new detections would replace it: name another --output"):
        retina(["report", *weights, "--output", "out", *against])
    with pytest.raises(SystemExit, match=r"--against no\.json: there is no such file"):
        retina(["report", *weights, "--output", "new", "--against", "no.json"])
    assert earlier.read_text() == "[]" and not Path("new").exists()


def test_models_on_a_set_without_objects_have_no_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [None],
    }
    Path("none.json").write_text(json.dumps(content))
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 3], "score": 0.05}]
    Path("found.json").write_text(json.dumps(found))
    words = ["report", "--dataset", "coco:none.json", "--predictions", "found.json"]
    retina([*words, "--against", "found.json", "--output", "out"])
    printed = capsys.readouterr().out
    assert "no AP, because there are no objects" in printed and "Against" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset digits_scenes_val --predictions no.json", "no.json"),
        ("--dataset digits_scenes_vl --predictions x.json", "digits_scenes_v"),
        ("--config-file quick/digits_R18.yaml", "MODEL.WEIGHTS"),
        ("--config-file quick/digits_R18.yaml --weights no.pth", "no.pth"),
    ],
)
def test_bad_arguments_are_one_line(tiny_digits, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("[]")
    with pytest.raises(SystemExit) as error:
        retina(["report", *words.split(), "--output", "out"])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    ["", "--predictions x.json", "--dataset a --predictions x.json --config-file b.yaml"],
)
def test_usage(words):
    with pytest.raises(SystemExit) as error:
        retina(["report", *words.split(), "--output", "out"])
    assert error.value.code == 2
