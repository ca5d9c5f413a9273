"""torchrun starts killed ranks again, and the training ends as if nothing had happened."""

import json
import os
import subprocess
import sys

import pytest
import torch

SMALL = [
    *("SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(9,)", "SOLVER.WARMUP_ITERS", "3"),
    *("SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.001"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RETINANET.NORM", "", "MODEL.FPN.NORM", "", "DATASETS.TEST", "()"),
]

# Imported by each rank. In the first attempt, one of them kills itself after the first checkpoint.
KILLER = """
import os, signal, threading, time

def kill():
    while not os.path.exists(os.path.join(os.environ["KILLER_OUT"], "last_checkpoint")):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == os.environ["KILLED"]:
    threading.Thread(target=kill, daemon=True).start()
"""


def torchrun(repo, tmp_path, out, killed):
    """The command of a job that may be restarted: --resume from the first start on."""
    (tmp_path / "killer.py").write_text(KILLER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=3", "train_net.py", "--resume"]
    command += ["--config-file", "configs/quick/digits_R18.yaml", *SMALL, "OUTPUT_DIR", str(out)]
    command += ["IMPORTS", f"('{tmp_path / 'killer.py'}',)"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"KILLED": str(killed), "KILLER_OUT": str(out)}
    result = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (out / "stderr.txt").write_text(result.stderr)
    weights = torch.load(out / "model_final.pth", weights_only=False)["model"]
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    losses = {x["iteration"]: x["total_loss"] for x in lines if "total_loss" in x}
    return weights, losses, (out / "log.txt").read_text()


@pytest.mark.slow
def test_killed_rank_leads_to_the_same_weights(repo, tiny_digits, tmp_path):
    """Bit-identical, whichever rank it was."""
    weights, losses, log = torchrun(repo, tmp_path, tmp_path / "whole", killed="none")
    assert log.count("Starting training from iteration") == 1
    for rank in (0, 1):
        killed = torchrun(repo, tmp_path, tmp_path / f"killed{rank}", killed=rank)
        assert "Starting training from iteration 0" in killed[2]
        assert killed[2].count("Starting training from iteration") == 2
        assert all(torch.equal(killed[0][name], weights[name]) for name in weights)
        assert killed[1] == losses
