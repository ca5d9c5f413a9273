"""The command: trains, evaluates, resumes, and says in one line what cannot work."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from retina_plugin.cli import train as train_net
from retina_plugin.modeling import AnchorLabeler

RESULTS = "inference/digits_scenes_val/coco_instances_results.json"


@pytest.fixture
def config(tiny_cfg, tmp_path, monkeypatch):
    """A file with tiny_cfg; OUTPUT_DIR is in a temporary folder."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained: else there is no AP
    tiny_cfg.MODEL.DEVICE = "cuda"  # the default: train_net chooses the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


@pytest.fixture
def out(tiny_cfg):
    return Path(tiny_cfg.OUTPUT_DIR)


def run(config, *args):
    train_net.main(["--config-file", config, *args])


def error(config, *args):
    """The line that the command ends with; its exit status is 1."""
    with pytest.raises(SystemExit) as end:
        run(config, *args)
    line = end.value.code
    assert isinstance(line, str), "a text is printed on stderr and makes the status 1"
    assert line.startswith("error: ") and "\n" not in line
    return line.removeprefix("error: ")


def test_headline_command(repo, tmp_path):
    """Without COCO: one line that names DETECTRON2_DATASETS, and no traceback."""
    command = "train_net.py --config-file configs/retina_R101_800.yaml --num-gpus 8".split()
    env = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(repo)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=repo,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).strip().splitlines()
    assert line.startswith("error: DATASETS.TRAIN: coco_2017_train has no json_file at ")
    assert "DETECTRON2_DATASETS" in line and f"put COCO under {tmp_path} as coco/" in line


def test_without_detectron2(repo, monkeypatch):
    """One line that says how to get it."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("detectron2", "retina_plugin")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repo / "train_net.py"), run_name="__main__")
    assert end.value.code.startswith("error: Detectron2 is missing: run `make setup`")
    assert "\n" not in end.value.code


def test_trains_evaluates_and_resumes(config, out, capsys, log):
    """All files, the AP table, the line about the CPU; --resume goes on where it was."""
    run(config, "TEST.EVAL_PERIOD", "1")
    printed = capsys.readouterr().out
    assert "No GPU is used: running on cpu" in log.messages
    assert re.search(r"\| +AP +\| +AP50 +\| +AP75 +\| +APs +\| +APm +\| +APl +\|", printed)
    files = "config.yaml log.txt metrics.json model_final.pth model_best.pth"
    for name in (*files.split(), "training_curves.png", "detections.png"):
        assert (out / name).stat().st_size > 0, name
    logged = (out / "log.txt").read_text()
    assert "Starting training from iteration 0" in logged
    assert "Evaluation results for bbox" in logged
    assert "Training curves: " in logged  # our own lines are there too
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in metrics)
    results = json.loads((out / RESULTS).read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3, 4}

    run(config, "--resume", "SOLVER.MAX_ITER", "4", "MODEL.WEIGHTS", str(out / "not_needed.pth"))
    assert "Starting training from iteration 2" in (out / "log.txt").read_text()
    assert torch.load(out / "model_final.pth", weights_only=False)["iteration"] == 3


def test_resume_of_a_finished_training(config, out, capsys):
    """Evaluates again and changes nothing."""
    run(config)
    before = torch.load(out / "model_final.pth", weights_only=False)["model"]
    capsys.readouterr()
    run(config, "--resume")
    printed = capsys.readouterr().out
    assert "Starting training from iteration 2" in printed
    assert "Evaluation results for bbox" in printed
    after = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_eval_only(config, out, tmp_path, capsys):
    """The numbers of the training's own evaluation, and the sheet; nothing is trained."""
    run(config)
    weights = tmp_path / "weights.pth"
    shutil.copy(out / "model_final.pth", weights)
    expected = (out / RESULTS).read_text()
    shutil.rmtree(out)
    capsys.readouterr()
    run(config, "--eval-only", "MODEL.WEIGHTS", str(weights), "DATASETS.TRAIN", "('not_there',)")
    assert "Evaluation results for bbox" in capsys.readouterr().out
    assert (out / RESULTS).read_text() == expected
    assert (out / "detections.png").is_file()
    assert not list(out.glob("*.pth"))


def test_eval_only_of_the_last_checkpoint(config, out, capsys):
    """With --resume; without, the weights must be named."""
    assert error(config, "--eval-only").startswith("--eval-only: set MODEL.WEIGHTS")
    run(config)
    expected = (out / RESULTS).read_text()
    run(config, "--eval-only", "--resume")
    assert (out / RESULTS).read_text() == expected


def test_a_test_set_without_annotations(config, out, tiny_digits, tmp_path):
    """As test-dev: trains and evaluates, and writes the results that are to be submitted."""
    coco = json.loads((tiny_digits / "val.json").read_text())
    del coco["annotations"]
    (tmp_path / "images.json").write_text(json.dumps(coco))
    images = str(tiny_digits / "val")
    register_coco_instances("test_unlabelled", {}, str(tmp_path / "images.json"), images)
    try:
        run(config, "DATASETS.TEST", "('test_unlabelled',)", "TEST.EVAL_PERIOD", "1")
        written = out / "inference/test_unlabelled/coco_instances_results.json"
        trained = json.loads(written.read_text())
        weights = str(out / "model_final.pth")
        args = ("DATASETS.TEST", "('test_unlabelled',)", "MODEL.WEIGHTS", weights)
        run(config, "--eval-only", *args)
    finally:
        DatasetCatalog.remove("test_unlabelled")
        MetadataCatalog.pop("test_unlabelled")
    assert json.loads(written.read_text()) == trained
    assert {r["image_id"] for r in trained} == {1, 2, 3, 4}
    assert {r["category_id"] for r in trained} <= set(range(1, 11))
    assert (out / "detections.png").is_file() and (out / "training_curves.png").is_file()
    assert not (out / "model_best.pth").exists()  # nothing says which is the best


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--num-gpus", "2"], "--num-gpus 2: this machine has 0"),
        (["MODEL.RETINANET.NUM_CLASSES", "80"], "MODEL.RETINANET.NUM_CLASSES is 80, but digits"),
        (["DATASETS.TRAIN", "('not_there',)"], "DATASETS.TRAIN: no dataset 'not_there'"),
        (["MODEL.WEIGHTS", "/no/such/weights.pkl"], "MODEL.WEIGHTS: no file /no/such/weights.pkl"),
        (["MODEL.RETINANET.CLS_LOS", "x"], "did you mean MODEL.RETINANET.CLS_LOSS"),
        (["MODEL.RETINANET.CLS_LOSS", "x"], "MODEL.RETINANET.CLS_LOSS: nothing is registered as"),
        (["MODEL.RETINANET.NORMALIZER", "x"], "MODEL.RETINANET.NORMALIZER: no 'x'; known: "),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH"),
    ],
)
def test_one_line_errors(config, out, args, expected):
    """Before the first iteration, with the key."""
    assert expected in error(config, *args)
    assert not (out / "metrics.json").exists()


def test_weights_that_cannot_be_downloaded(config, monkeypatch):
    """One line; a resumed run, which loads its checkpoint instead, does not need them."""

    def offline(path):
        raise OSError("no network")

    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    with monkeypatch.context() as patch:
        patch.setattr(PathManager, "get_local_path", offline)
        text = error(config, "MODEL.WEIGHTS", url)
    assert text.startswith("MODEL.WEIGHTS: cannot download https://") and "no network" in text


def test_warnings_come_before_the_training(config, log):
    """A learning rate for another batch, and a key of MODEL.ROI_HEADS."""
    run(config, "SOLVER.BASE_LR", "0.01", "MODEL.ROI_HEADS.NUM_CLASSES", "10")

    def first(text):
        return next(i for i, message in enumerate(log.messages) if text in message)

    start = first("Starting training")
    assert first("linear scaling gives SOLVER.BASE_LR 0.00125") < start
    assert first("MODEL.ROI_HEADS.NUM_CLASSES is set to 10") < start


def test_one_process_of_a_machine_speaks(config, monkeypatch):
    """The others end without a failure, or the launcher would kill the one that speaks."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        run(config, "MODEL.RETINANET.NUM_CLASSES", "80")
    assert end.value.code == 0


def test_an_error_in_training_is_said_too(config, monkeypatch):
    """By whichever process meets it."""

    def check(self, classes):
        raise train_net.ConfigError("class 10 is outside")

    monkeypatch.setattr(AnchorLabeler, "_check_classes", check)
    monkeypatch.setattr(train_net.comm, "get_local_rank", lambda: 1)
    assert error(config) == "class 10 is outside"


@pytest.fixture
def broken_image(tiny_digits):
    """spoil(split): the first image of the tiny set is no image; it is restored afterwards."""
    spoiled = []

    def spoil(split):
        path = sorted((tiny_digits / split).glob("*"))[0]
        spoiled.append((path, path.read_bytes()))
        path.write_bytes(b"not an image")
        return path

    yield spoil
    for path, data in spoiled:
        path.write_bytes(data)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_in_training(config, broken_image, workers):
    """One line with its name, without the traceback of the loader's worker."""
    path = broken_image("train")
    args = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", "8")
    line = error(config, *args)
    assert line.startswith(f"cannot read the image {path} (") and line.endswith("annotations")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_in_evaluation(
    config, out, broken_image, monkeypatch, workers
):
    """The process that meets it fails, whichever it is: the others would wait for it."""
    run(config)
    path = broken_image("val")
    monkeypatch.setattr(train_net.comm, "get_local_rank", lambda: 1)
    weights = str(out / "model_final.pth")
    args = ("--eval-only", "DATALOADER.NUM_WORKERS", workers, "MODEL.WEIGHTS", weights)
    assert error(config, *args).startswith(f"cannot read the image {path} (")
