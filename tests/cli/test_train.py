"""The command: training, evaluation, resuming, what it prints, and its one-line errors."""

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

from retina_plugin.cli import train as train_command
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import AnchorLabeler

TABLE = re.compile(r"\| +AP +\| +AP50 +\| +AP75 +\| +APs +\| +APm +\| +APl +\|")
RESULTS = "inference/digits_scenes_val/coco_instances_results.json"


@pytest.fixture
def config(tiny_cfg, tmp_path, monkeypatch):
    """Path of a config file with ``tiny_cfg``."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # an untrained model has an AP then
    tiny_cfg.MODEL.DEVICE = "cuda"  # the default; the command changes it to the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


@pytest.fixture
def out(tiny_cfg):
    return Path(tiny_cfg.OUTPUT_DIR)


def run(config, *args):
    train_command.main(["--config-file", config, *args])


def error(config, *args):
    """The line that the command ends with, after "error: "."""
    with pytest.raises(SystemExit) as end:
        run(config, *args)
    line = end.value.code
    assert isinstance(line, str)  # sys.exit prints it on stderr; the exit status is 1
    assert line.startswith("error: ") and "\n" not in line
    return line.removeprefix("error: ")


def test_training_without_coco_prints_one_line(repo, tmp_path):
    """The README's command. The line names DETECTRON2_DATASETS and the folder."""
    command = "train_net.py --config-file configs/retina_R101_800.yaml --num-gpus 8".split()
    env = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(repo)}
    result = subprocess.run(
        [sys.executable, *command],
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


def test_training_without_detectron2_prints_one_line(repo, monkeypatch):
    """It says how to install Detectron2."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("detectron2", "retina_plugin")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repo / "train_net.py"), run_name="__main__")
    assert end.value.code.startswith("error: Detectron2 is missing: run `make setup`")
    assert "\n" not in end.value.code


def test_trains_evaluates_and_resumes(config, out, capsys):
    """It writes all files, and --resume continues."""
    run(config, "TEST.EVAL_PERIOD", "1")
    assert TABLE.search(capsys.readouterr().out)
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


@pytest.mark.slow
def test_resuming_a_finished_training_evaluates_it(config, out, capsys):
    """The weights do not change."""
    run(config)
    before = torch.load(out / "model_final.pth", weights_only=False)["model"]
    capsys.readouterr()
    run(config, "--resume")
    printed = capsys.readouterr().out
    assert "2 iterations of 2 images (0.5 epochs), of which 2 are done" in printed
    assert TABLE.search(printed)
    after = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_eval_only(config, out, tmp_path, capsys):
    """It gives the numbers of the training's own evaluation, and trains nothing."""
    run(config)
    weights = tmp_path / "weights.pth"
    shutil.copy(out / "model_final.pth", weights)
    expected = (out / RESULTS).read_text()
    capsys.readouterr()
    out = tmp_path / "evaluation"
    args = ("MODEL.WEIGHTS", str(weights), "DATASETS.TRAIN", "('not_there',)")
    run(config, "--eval-only", *args, "OUTPUT_DIR", str(out))
    printed = capsys.readouterr().out
    assert TABLE.search(printed) and len(printed.splitlines()) <= 15
    assert f"Weights     {weights}" in printed
    assert (out / RESULTS).read_text() == expected
    assert (out / "detections.png").is_file()
    assert not list(out.glob("*.pth"))


def test_eval_only_of_the_last_checkpoint(config, out, capsys):
    """With --resume. Without it, MODEL.WEIGHTS must be set."""
    assert error(config, "--eval-only").startswith("--eval-only: set MODEL.WEIGHTS")
    run(config)
    expected = (out / RESULTS).read_text()
    run(config, "--eval-only", "--resume")
    assert (out / RESULTS).read_text() == expected


def test_set_without_annotations(config, out, tiny_digits, tmp_path):
    """Such as test-dev: the detections are written, and there is no AP."""
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
    assert not (out / "model_best.pth").exists()  # there is no AP to choose it by


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--num-gpus", "2"], "--num-gpus 2: this machine has 0"),
        (["MODEL.RETINANET.NUM_CLASSES", "80"], "MODEL.RETINANET.NUM_CLASSES: is 80, but digits"),
        (["DATASETS.TRAIN", "('not_there',)"], "DATASETS.TRAIN: no dataset 'not_there' is"),
        (["MODEL.WEIGHTS", "/no/such/weights.pkl"], "MODEL.WEIGHTS: no file /no/such/weights.pkl"),
        (["MODEL.RETINANET.CLS_LOS", "x"], "did you mean 'MODEL.RETINANET.CLS_LOSS'"),
        (["MODEL.RETINANET.CLS_LOSS", "x"], "MODEL.RETINANET.CLS_LOSS: unknown 'x'"),
        (["MODEL.RETINANET.NORMALIZER", "x"], "MODEL.RETINANET.NORMALIZER: "),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH"),
    ],
)
def test_wrong_config_prints_one_line(config, out, args, expected):
    """With the key, before the first iteration."""
    assert expected in error(config, *args)
    assert not (out / "metrics.json").exists()


def test_failed_download_prints_one_line(config, monkeypatch):
    """With the URL and the reason."""

    def offline(path):
        raise OSError("no network")

    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    with monkeypatch.context() as patch:
        patch.setattr(PathManager, "get_local_path", offline)
        text = error(config, "MODEL.WEIGHTS", url)
    assert text.startswith("MODEL.WEIGHTS: cannot download https://") and "no network" in text


def test_warnings_are_printed_before_the_training(config, capsys):
    """Of a learning rate without its batch, and of a key of MODEL.ROI_HEADS."""
    run(config, "SOLVER.BASE_LR", "0.01", "MODEL.ROI_HEADS.NUM_CLASSES", "10")
    before, after = capsys.readouterr().out.split("iteration 1/2", 1)
    assert "WARNING: SOLVER.BASE_LR 0.01 with SOLVER.IMS_PER_BATCH 2: " in before
    assert "WARNING: MODEL.ROI_HEADS.NUM_CLASSES: is set to 10" in before
    assert "WARNING" not in after


@pytest.mark.slow
def test_training_prints_a_page(repo, config, out):
    """And nothing else, not even on stderr; environment and config are in the log file."""
    # A CUDA compiler without a GPU makes PyTorch print a line.
    env = os.environ | {"PYTHONPATH": str(repo), "CUDA_HOME": str(out.parent)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_net.py", "--config-file", config]
    command += ["SOLVER.MAX_ITER", "50", "TEST.EVAL_PERIOD", "25", "VIS_PERIOD", "10"]
    result = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) <= 50
    for line in (
        rf"Config +{config} SOLVER.MAX_ITER 50 TEST.EVAL_PERIOD 25 VIS_PERIOD 10",
        r"Loss +FocalLoss and smooth_l1",
        r"Trained on +digits_scenes_train: 8 images, 10 classes",
        r"Tested on +digits_scenes_val, every 25 iterations and at the end",
        r"Device +cpu",
        r"Length +50 iterations of 2 images \(12.5 epochs\)",
        r"iteration 50/50  loss [\d.]+  lr [\d.e-]+  0:00:00 left",
        r"Evaluation of iteration 25 on digits_scenes_val: AP [\d.]+, AP50 .*",
        r"\| digits_scenes_val \| +[\d.]+ .*",
        rf"Training curves: {out}/training_curves.png",
        rf"Detections against ground truth: {out}/detections.png",
        rf"Weights +{out}/model_final.pth",
    ):
        assert sum(re.fullmatch(line, x) is not None for x in lines) == 1, line
    assert lines[-1] == f"Log         {out}/log.txt"
    assert 10 <= sum(line.startswith("iteration ") for line in lines) <= 20
    logged = (out / "log.txt").read_text()
    for text in ("Environment info:", "Running with full config:", "FocalRetinaNet(", "iter: 39 "):
        assert text in logged, text
    assert "Average Precision" in logged  # what pycocotools prints


def test_config_of_the_paper_by_name(config, out, capsys):
    """``--config-file`` takes a file, or a name in the package."""
    name = "quick/digits_R18_short.yaml"
    opts = ["OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"]
    opts += ["MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", "", "DATASETS.TEST", "()"]
    opts += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0075"]
    run(name, *opts)
    assert "digits_R18_short.yaml" in capsys.readouterr().out
    assert (out / "model_final.pth").is_file()


def test_one_process_of_a_machine_prints_the_error(config, monkeypatch):
    """The others end with status 0, or the launcher could stop the first one too early."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        run(config, "MODEL.RETINANET.NUM_CLASSES", "80")
    assert end.value.code == 0


def test_any_process_prints_an_error_of_the_training(config, monkeypatch):
    """Perhaps only one process meets it."""

    def check(self, classes):
        raise ConfigError("class 10 is outside")

    monkeypatch.setattr(AnchorLabeler, "_check_classes", check)
    monkeypatch.setattr(train_command.comm, "get_local_rank", lambda: 1)
    assert error(config) == "class 10 is outside"


@pytest.fixture
def broken_image(tiny_digits):
    """``broken_image(split)`` overwrites an image until the end of the test; returns its path."""
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
def test_broken_image_in_training_prints_one_line(config, broken_image, workers):
    """With its path, and without the traceback of the loader's worker."""
    path = broken_image("train")
    args = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", "8")
    line = error(config, *args)
    assert line.startswith(f"cannot read the image {path} (") and line.endswith("or leave it out")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_in_evaluation_prints_one_line(
    config, out, broken_image, monkeypatch, workers
):
    """From the process that meets it, whichever that is."""
    run(config)
    path = broken_image("val")
    monkeypatch.setattr(train_command.comm, "get_local_rank", lambda: 1)
    weights = str(out / "model_final.pth")
    args = ("--eval-only", "DATALOADER.NUM_WORKERS", workers, "MODEL.WEIGHTS", weights)
    assert error(config, *args).startswith(f"cannot read the image {path} (")
