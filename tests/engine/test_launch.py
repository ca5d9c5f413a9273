"""Several processes: a real run with torchrun, and the call of Detectron2's launch."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from retina_plugin.engine import launch
from retina_plugin.errors import ConfigError

# The digits config made small: 64 px images, no batch norm (a level has one pixel), and no score
# threshold, so that an untrained model has an AP.
SMALL = [
    *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RETINANET.NORM", "", "MODEL.FPN.NORM", "", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]


def torchrun(repo, *overrides):
    """Run train_net.py on the digits in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train_net.py", "--config-file", "configs/quick/digits_R18.yaml"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *SMALL, *overrides],
        cwd=repo,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_torchrun_trains_and_evaluates(repo, tiny_digits, tmp_path):
    """Two processes share each batch and the validation set; one writes results and prints."""
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), "MODEL.RETINANET.NORMALIZER", "ema")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for rank, name in enumerate(["log.txt", "log.txt.rank1"]):
        log = (tmp_path / name).read_text()
        assert f"Rank of current process: {rank}. World size: 2" in log
    assert len(re.findall(r"^Device +cpu, 2 processes$", result.stdout, re.M)) == 1
    assert len(re.findall(r"^iteration 3/3  loss [\d.]+", result.stdout, re.M)) == 1
    assert len(re.findall(r"\| +AP +\| +AP50 ", result.stdout)) == 1
    assert len(result.stdout.splitlines()) <= 50
    # each process detects its share of the images
    (found,) = tmp_path.glob("inference/*/coco_instances_results.json")
    detections = json.loads(found.read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4}
    assert len({json.dumps(d) for d in detections}) == len(detections) <= 4 * 100
    for name in ("model_final.pth", "model_best.pth", "training_curves.png", "detections.png"):
        assert (tmp_path / name).is_file(), name
    # the average counts the positives of both processes
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert not any(key.startswith("module.") for key in checkpoint["model"])
    assert checkpoint["trainer"]["loss_normalizer_ema"] != 100.0


def test_torchrun_with_all_options(repo, tiny_digits, tmp_path):
    """16 bit, accumulation and checkpointing together, also in evaluation."""
    fast = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    fast += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE", "2", "TEST.PRECISION", "bfloat16"]
    fast += ["MODEL.CHANNELS_LAST", "True", "MODEL.ACTIVATION_CHECKPOINTING", "True"]
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), *fast)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^iteration 3/3  loss [\d.]+", result.stdout, re.M)
    assert re.search(r"\| +AP +\| +AP50 ", result.stdout)


def test_torchrun_prints_an_error_once(repo, tiny_digits, tmp_path):
    """Not once for each process."""
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "3")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: SOLVER.IMS_PER_BATCH: 3 cannot be split over 2 processes: set it to 4 and "
        "SOLVER.BASE_LR to 0.00133333"
    ]


@pytest.fixture
def args():
    return argparse.Namespace(num_machines=2, machine_rank=1, dist_url="tcp://10.0.0.1:9")


@pytest.mark.parametrize(("num_gpus", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_without_torchrun_detectron2_launches(monkeypatch, args, num_gpus, processes):
    """With the options of the command line. Without a GPU it launches one process."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *a, **k: calls.append((a, k)))
    launch.run(print, args, num_gpus, "cfg")
    options = {"num_machines": 2, "machine_rank": 1, "dist_url": "tcp://10.0.0.1:9"}
    assert calls == [((print, processes), {**options, "args": (args, "cfg")})]


def test_one_process_is_not_spawned(monkeypatch, args):
    """It runs in the process that calls."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args.num_machines = 1
    calls = []
    launch.run(lambda *a: calls.append((os.getpid(), a)), args, 0, "cfg")
    assert calls == [(os.getpid(), (args, "cfg"))]


def test_more_processes_than_gpus_raise(monkeypatch, args):
    """Under torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"torchrun --nproc_per_node 8: this machine has 4 GPUs"):
        launch.run(print, args, 4)
