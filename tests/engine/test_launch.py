"""Several processes: a real run with torchrun, and the call of Detectron2's launch."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

from retina_plugin.engine import launch
from retina_plugin.engine.failures import one_line
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


@pytest.mark.slow
def test_torchrun_with_all_options(repo, tiny_digits, tmp_path):
    """16 bit, accumulation and checkpointing together, also in evaluation."""
    fast = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    fast += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE", "2", "TEST.PRECISION", "bfloat16"]
    fast += ["MODEL.CHANNELS_LAST", "True", "MODEL.ACTIVATION_CHECKPOINTING", "True"]
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), *fast)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^iteration 3/3  loss [\d.]+", result.stdout, re.M)
    assert re.search(r"\| +AP +\| +AP50 ", result.stdout)


@pytest.mark.slow
def test_torchrun_prints_an_error_once(repo, tiny_digits, tmp_path):
    """Not once for each process."""
    result = torchrun(repo, "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "3")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: SOLVER.IMS_PER_BATCH: 3 cannot be split over 2 processes: set it to 4 and "
        "SOLVER.BASE_LR to 0.00133333"
    ]
    # torchrun's own report ends with it, above a line of "="
    report = result.stderr.strip().splitlines()
    assert report[-2] == f"  traceback : {lines[0]}" and set(report[-1]) == {"="}


@pytest.fixture
def args():
    return argparse.Namespace(num_machines=2, machine_rank=1, dist_url="tcp://10.0.0.1:9")


def test_timeout_must_be_positive(args):
    with pytest.raises(ConfigError, match=r"SOLVER.PROCESS_TIMEOUT must be more than 0"):
        launch.run(print, args, 0, timeout=0)


@pytest.mark.parametrize(("num_gpus", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_without_torchrun_detectron2_launches(monkeypatch, args, num_gpus, processes):
    """With the options of the command line. Without a GPU it launches one process."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *a, **k: calls.append((a, k)))
    launch.run(print, args, num_gpus, "cfg", timeout=30)
    options = {"num_machines": 2, "machine_rank": 1, "dist_url": "tcp://10.0.0.1:9"}
    options["timeout"] = timedelta(seconds=300)  # of one collective operation
    passed = (print, 30, args, "cfg")
    assert calls == [((launch._process, processes), {**options, "args": passed})]


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


FAILING = """
import argparse, os, signal, sys, time
import torch
from detectron2.utils import comm
from retina_plugin.engine.launch import run

def main(args):
    if comm.get_rank() == args.rank:
        if args.how == "line":
            sys.exit("error: image.jpg is broken")
        if args.how == "exception":
            raise KeyError("a name")
        if args.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))

if __name__ == "__main__":
    machine, url, how, rank = sys.argv[1:]
    args = argparse.Namespace(
        num_machines=2, machine_rank=int(machine), dist_url=url, how=how, rank=int(rank)
    )
    run(main, args, 0)
"""


@pytest.fixture
def two_machines(tmp_path, repo):
    """two_machines(how, rank): return codes and errors of two of Detectron2's launches."""

    def start(how, rank):
        (tmp_path / "failing.py").write_text(FAILING)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
        started = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "failing.py"), str(machine), url, how, str(rank)],
                env=env,
                stderr=subprocess.PIPE,
                text=True,
            )
            for machine in (0, 1)
        ]
        errors = [process.communicate(timeout=120)[1] for process in started]
        return [process.returncode for process in started], errors

    return start


def without_torch_log(text):
    """The lines that are not PyTorch's warning that the store's process has ended.

    Its C++ code prints it with a stack trace if the heartbeat happens to write just then.
    """
    torchs = r"(\[rank\d+\]:)?\[W\d|Exception raised from |frame #\d+: |<omitting python frames>"
    return "\n".join(line for line in text.splitlines() if not re.match(torchs, line))


def test_log_of_torch_is_told_from_errors():
    log = """[rank1]:[W1126 01:04:26.748218006 TCPStore.cpp:106] [c10d] sendBytes failed
Exception raised from sendBytes at /pytorch/torch/csrc/distributed/c10d/Utils.hpp:757 (most recent):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7fe47915c13d in libc10.so)
<omitting python frames>
frame #20: <unknown function> + 0x1098ec (0x7fe47a1278ec in /lib/x86_64-linux-gnu/libc.so.6)
"""
    lines = "Traceback (most recent call last):\nRuntimeError: Connection reset\nerror: lost"
    assert without_torch_log(log + lines) == lines


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["line", "exception", "killed"])
def test_launch_says_once_which_process_failed(two_machines, how, rank):
    """The process that loses its connection to the failed one has no traceback of its own."""
    codes, errors = two_machines(how, rank)
    assert all(codes)
    other = errors[1 - rank]
    if how == "killed":
        assert re.search(rf"^error: rank {rank} \(process \d+ on .*\) was killed, ", other, re.M)
        last = errors[rank].strip().splitlines()[-1]
        assert re.fullmatch(r"error: process \d+ was killed, .* \(SIGKILL\)", last)
    else:
        last = {"line": "error: image.jpg is broken", "exception": "KeyError: 'a name'"}[how]
        assert errors[rank].strip().splitlines()[-1] == last
        assert "error" not in without_torch_log(other).lower().replace("failing.py", "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("DataLoader worker (pid(s) 19449, 19450) exited unexpectedly"),
            r"error: a worker of the data loader \(process 19449, 19450\) was killed.*_WORKERS.*",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"error: a worker of the data loader \(process 7\) was killed.*--resume.*",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory."
            ),
            r"error: the shared memory of this machine \(/dev/shm\) is full.*--shm-size.*",
        ),
        (
            RuntimeError("unable to write to file </torch_123_0>: No space left on device (28)"),
            r"error: the shared memory .*",
        ),
        (RuntimeError("received 0 items of ancdata"), r"error: too many open files: .*ulimit.*"),
        (OSError(24, "Too many open files"), r"error: too many open files: .*ulimit.*"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
            r"error: the GPU's memory is full \(CUDA out of memory.*2 GiB.\): .*ACCUMULATE.*",
        ),
        (MemoryError(), r"error: the memory of this machine is full: .*"),
    ],
    ids=str,
)
def test_machine_that_is_too_small_is_one_line(error, expected):
    """With the key to change."""
    assert re.fullmatch(expected, one_line(error))


def test_other_errors_keep_their_traceback():
    assert one_line(RuntimeError("The size of tensor a must match")) is None


@pytest.mark.slow
def test_killed_worker_prints_one_line(repo, tiny_digits, tmp_path):
    """It is what the kernel does to it when the memory is full."""
    command = [sys.executable, "train_net.py", "--config-file", "configs/quick/digits_R18.yaml"]
    command += [*SMALL, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "1"]
    command += ["SOLVER.MAX_ITER", "100000"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=repo, env=env, stderr=subprocess.PIPE, text=True) as run:
        end = time.monotonic() + 120
        while not (tmp_path / "metrics.json").exists() and time.monotonic() < end:
            time.sleep(0.2)
        ps = ["ps", "-o", "pid=,args=", "--ppid", str(run.pid)]
        listed = subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()
        (worker,) = [int(line.split()[0]) for line in listed if "train_net.py" in line]
        os.kill(worker, signal.SIGKILL)
        errors = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert errors.startswith(f"error: a worker of the data loader (process {worker}) was killed")
    assert len(errors.strip().splitlines()) == 1
