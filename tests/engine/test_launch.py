"""Several processes: by torchrun for real, and what is passed to Detectron2's launch."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from detectron2.utils import comm

from retina_plugin.engine import launch
from retina_plugin.errors import ConfigError

# the first digits config, small: 64 px, no batch norm over one pixel, an AP without training
SMALL = [
    *("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001", "SOLVER.LR_PER_IMAGE", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RETINANET.NORM", "", "MODEL.FPN.NORM", "", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]


def torchrun(repo, *overrides):
    """train_net.py on the digits in two processes of the CPU."""
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
    """Two processes share each batch and the validation set; one writes the results."""
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), "MODEL.RETINANET.NORMALIZER", "ema")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for rank, name in enumerate(["log.txt", "log.txt.rank1"]):
        log = (tmp_path / name).read_text()
        assert f"Rank of current process: {rank}. World size: 2" in log
    assert re.search(r"iter: 2 +total_loss: [\d.]+", result.stdout)
    assert result.stdout.count("Evaluation results for bbox") == 1
    assert re.search(r"\| +AP +\| +AP50 ", result.stdout)
    # every image of the set, from both processes, once
    (found,) = tmp_path.glob("inference/*/coco_instances_results.json")
    detections = json.loads(found.read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4}
    assert len({json.dumps(d) for d in detections}) == len(detections) <= 4 * 100
    for name in ("model_final.pth", "model_best.pth", "training_curves.png", "detections.png"):
        assert (tmp_path / name).is_file(), name
    # one image a process: the average counts the mean over the processes, not one of them
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert not any(key.startswith("module.") for key in checkpoint["model"])
    assert checkpoint["trainer"]["loss_normalizer_ema"] != 100.0


def test_torchrun_with_all_options(repo, tiny_digits, tmp_path):
    """16 bit, accumulation, recomputation and compressed gradients together, and in evaluation."""
    fast = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    fast += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE", "2", "TEST.PRECISION", "bfloat16"]
    fast += ["MODEL.CHANNELS_LAST", "True", "MODEL.ACTIVATION_CHECKPOINTING", "True"]
    fast += ["SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW", "True", "SOLVER.DDP.COMPRESSION", "float16"]
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), *fast)
    assert result.returncode == 0, result.stderr
    assert re.search(r"iter: 2 +total_loss: [\d.]+", result.stdout)
    assert re.search(r"\| +AP +\| +AP50 ", result.stdout)


def test_torchrun_says_it_once(repo, tiny_digits, tmp_path):
    """What the processes cannot do together is one line, not one of each process."""
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "3")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: SOLVER.IMS_PER_BATCH 3 cannot be split over 2 processes: set it to 4 and "
        "SOLVER.BASE_LR to 0.00133333"
    ]


@pytest.fixture
def args():
    return argparse.Namespace(num_machines=2, machine_rank=1, dist_url="tcp://10.0.0.1:9")


@pytest.mark.parametrize(("num_gpus", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_detectron2_launches_where_torchrun_did_not(monkeypatch, args, num_gpus, processes):
    """With its options; no GPU is one process."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *a, **k: calls.append((a, k)))
    launch.run(print, args, num_gpus, "cfg")
    options = {"num_machines": 2, "machine_rank": 1, "dist_url": "tcp://10.0.0.1:9"}
    assert calls == [((print, processes), {**options, "args": (args, "cfg")})]


def test_one_process_stays_here(monkeypatch, args):
    """Nothing is spawned."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args.num_machines = 1
    calls = []
    launch.run(lambda *a: calls.append((os.getpid(), a)), args, 0, "cfg")
    assert calls == [(os.getpid(), (args, "cfg"))]


def test_more_processes_than_gpus(monkeypatch, args):
    """One line under torchrun too."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"torchrun --nproc_per_node 8: there are 4 GPUs"):
        launch.run(print, args, 4)


def test_detectron2_without_a_function_for_the_local_group(monkeypatch, tmp_path):
    """v0.6 makes the group of a machine's processes inside its launch() only."""
    monkeypatch.delattr(comm, "create_local_process_group")
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        launch._create_local_process_group(1)
        assert comm.get_local_rank() == 0 and comm.get_local_size() == 1
    finally:
        torch.distributed.destroy_process_group()
