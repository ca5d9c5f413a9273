"""A process that hangs ends the others with a line that names it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from retina_plugin.engine import heartbeat
from retina_plugin.engine.heartbeat import _Others, _place, _Report, _verdict

TIMEOUT = 10.0
OWN = _Report(0, "a", 1)


def others(*reports, silent=(), now=100.0):
    """As seen at ``now``; the silent ones have not changed for the whole time limit."""
    seen = _Others(read=now)
    seen.update({r.rank: r for r in reports}, now)
    seen.changed |= dict.fromkeys(silent, now - TIMEOUT)
    return seen


def verdict(*reports, own=OWN, silent=(), now=100.0):
    return _verdict(others(*reports, silent=silent), own, TIMEOUT, now)


def test_silent_process_is_named():
    """By the first of the others, whatever they do."""
    line, speaker = verdict(OWN, _Report(1, "b", 7), _Report(2, "c", 8), silent=[1])
    assert line.startswith("rank 1 (process 7 on b) is stopped, or cannot be reached: no sign of ")
    assert "10 s" in line and "SOLVER.PROCESS_TIMEOUT" in line and speaker == 0
    line, speaker = verdict(OWN, _Report(1, "b", 7), _Report(2, "c", 8), silent=[0, 2])
    assert line.startswith("rank 0 (process 1 on a), rank 2 (process 8 on c) are") and speaker == 1


def test_process_that_is_done_or_has_failed_may_be_silent():
    for end in ({"done": True}, {"failure": "error: x"}):
        assert verdict(OWN, _Report(1, "b", 7, **end), silent=[1]) is None


def test_process_that_does_not_wait_is_named():
    """All are in an iteration for too long: the one that waits for no other is the cause."""
    stuck = {"iteration": 7, "seconds": 11.0}
    waiting = _Report(0, "a", 1, **stuck, place="run_step (step.py:1)", waits=True)
    reading = _Report(1, "b", 7, **stuck, place="read_image (images.py:45)")
    line, _ = verdict(waiting, reading, own=waiting)
    assert line.startswith(
        "no process has finished iteration 7 in 10 s: rank 1 (process 7 on b) is"
    )
    assert "is in read_image (images.py:45)" in line and "rank 0" not in line


@pytest.mark.parametrize(
    "other",
    [
        _Report(1, "b", 7),  # between two iterations: it evaluates, or writes a checkpoint
        _Report(1, "b", 7, iteration=7, seconds=9.0),
    ],
)
def test_process_with_time_left_does_not_end_the_others(other):
    waiting = _Report(0, "a", 1, iteration=7, seconds=1000.0, waits=True)
    assert verdict(waiting, other, own=waiting) is None


def test_processes_that_all_compute_go_on():
    """A slow iteration is no hang."""
    reports = [_Report(rank, "a", rank, iteration=7, seconds=1000.0) for rank in range(2)]
    assert verdict(*reports) is None


def test_store_that_does_not_answer_ends_the_process():
    """Its process, or torchrun, is stopped."""
    line, speaker = verdict(OWN, _Report(1, "b", 7), own=_Report(1, "b", 7), now=110.0)
    assert line.startswith("no news of the other processes for 10 s: torchrun or rank 0 (process 1")
    assert speaker == 1


def test_own_stop_is_not_taken_for_that_of_the_others():
    """After SIGCONT the others have news at once."""
    seen = others(OWN, _Report(1, "b", 7), silent=[1])
    seen.restart(100.0)
    assert _verdict(seen, OWN, TIMEOUT, 101.0) is None


def test_place_is_the_innermost_of_the_users_code():
    place, waits = _place(sys._getframe())
    assert re.fullmatch(r"test_place\w+ \(test_heartbeat.py:\d+\)", place) and not waits


def test_hook_tells_iterations_but_the_first():
    """The first one compiles."""
    told = []

    class Told:
        def begin(self, iteration):
            told.append(iteration)

        def end(self):
            told.append("end")

    class Trainer:
        start_iter = 3

    hook = heartbeat.HeartbeatHook()
    hook.trainer = Trainer()
    hook.trainer.iter = 3
    hook.before_step()  # no heartbeat: nothing happens
    heartbeat.Heartbeat._current = Told()
    try:
        for hook.trainer.iter in (3, 4):
            hook.before_step()
            hook.after_step()
    finally:
        heartbeat.Heartbeat._current = None
    assert told == ["end", 4, "end"]


@pytest.fixture
def two_ranks(monkeypatch):
    """The heartbeats of ranks 0 and 1 in this process, each with a first report in one store."""
    monkeypatch.setattr(heartbeat.comm, "get_world_size", lambda: 2)
    store, ranks = torch.distributed.HashStore(), []
    for rank in (0, 1):
        monkeypatch.setattr(heartbeat.comm, "get_rank", lambda rank=rank: rank)
        ranks.append(heartbeat.Heartbeat(timeout=20))
        ranks[-1]._store = store
        ranks[-1]._write()
    for of_rank in ranks:
        of_rank._read()
    return ranks


def fail(of_rank):
    """Report a failure from a thread, which ends when the others have read it."""
    thread = threading.Thread(target=of_rank.report_failure, args=("error: x",))
    thread.start()
    return thread


def test_rank_that_holds_the_store_ends_after_the_others_have_read_why(two_ranks):
    """However long the other one takes from one report to the next."""
    failing, reader = two_ranks
    thread = fail(failing)
    for _ in range(2):
        thread.join(0.2)
        assert thread.is_alive()
        reader._write()
        reader._read()
        failing._read()
    thread.join(10)
    assert not thread.is_alive() and reader.find_failed().failure == "error: x"


def test_failing_rank_does_not_wait_for_a_process_that_is_gone(two_ranks):
    failing, _ = two_ranks
    thread = fail(failing)
    end = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < end:
        failing._read()  # as its thread does
        time.sleep(0.05)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", [{"failure": "error: y"}, {"done": True}], ids=str)
def test_failing_rank_does_not_wait_for_one_that_has_ended(two_ranks, no_sleep, end):
    failing, other = two_ranks
    other._update(**end)
    failing.report_failure("error: x")


@pytest.fixture
def no_sleep(monkeypatch):
    """A process that waits fails the test."""

    def sleep(seconds):
        raise AssertionError("waits")

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)


def test_rank_without_the_store_ends_at_once(two_ranks, no_sleep):
    """Its report stays in the store."""
    reader, failing = two_ranks
    failing.report_failure("error: x")
    reader._read()
    assert reader.find_failed().failure == "error: x"


SMALL = [
    *("SOLVER.MAX_ITER", "100000", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RETINANET.NORM", "", "MODEL.FPN.NORM", ""),
]


@pytest.fixture
def training(repo, tiny_digits, tmp_path):
    """training(timeout): torchrun with two ranks that train; its process and theirs, by rank."""
    started = []

    def start(timeout):
        out = tmp_path / "out"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "train_net.py"]
        command += ["--config-file", "configs/quick/digits_R18.yaml", *SMALL]
        command += ["OUTPUT_DIR", str(out), "SOLVER.PROCESS_TIMEOUT", str(timeout)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
        pipe = subprocess.PIPE
        agent = subprocess.Popen(command, cwd=repo, env=env, stdout=pipe, stderr=pipe, text=True)
        started.append(agent.pid)
        end = time.monotonic() + 120
        while not (out / "metrics.json").exists() and time.monotonic() < end:
            assert agent.poll() is None, agent.communicate()
            time.sleep(0.2)
        ranks = {}
        for pid in children(agent.pid):
            rank = re.search(rb"(?:^|\0)RANK=(\d)", environment(pid))
            if rank:
                ranks[int(rank[1])] = pid
        started.extend(ranks.values())
        assert ranks.keys() == {0, 1}
        return agent, ranks

    yield start
    for pid in started:
        if b"train_net.py" in command_of(pid):
            os.kill(pid, signal.SIGKILL)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(x) for x in found.stdout.split()]


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_process_ends_the_others_with_its_name(training, rank):
    """SIGSTOP; torchrun kills the stopped process 30 s later, and its report ends with the line."""
    agent, ranks = training(timeout=5)
    os.kill(ranks[rank], signal.SIGSTOP)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 1
    line = rf"error: rank {rank} \(process {ranks[rank]} on .*\) is stopped, or cannot be reached.*"
    lines = errors.strip().splitlines()
    assert sum(re.fullmatch(line, x) is not None for x in lines) == 1
    assert re.fullmatch(rf"  traceback : {line}", lines[-2]) and set(lines[-1]) == {"="}


@pytest.mark.slow
def test_killed_torchrun_leaves_no_process(training):
    """Its ranks do not train on as orphans."""
    agent, ranks = training(timeout=60)
    agent.kill()
    agent.communicate(timeout=60)
    end = time.monotonic() + 60
    while any(b"train_net.py" in command_of(pid) for pid in ranks.values()):
        assert time.monotonic() < end, "still there"
        time.sleep(0.2)
