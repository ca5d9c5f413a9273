"""A training that is killed and resumed ends as one that was not, to the bit.

``resume_runner.py`` runs the trainings, each in a process that is forked for it.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retina_plugin.losses.backends import native

RUNNER = Path(__file__).with_name("resume_runner.py")
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}  # of the clock
# Detectron2 reads these keys, but has no defaults for them.
KEYS = {
    "DATALOADER.RANDOM_SUBSET_RATIO": 0.6,
    "DATASETS.TRAIN_REPEAT_FACTOR": [["mixed_train", 1.5]],
}
REPEAT = ["DATALOADER.REPEAT_THRESHOLD", "0.9", "DATALOADER.SAMPLER_TRAIN"]
# The training that all others vary: evaluation after iterations 2 and 5, checkpoints after 1, 3
# and 5 (counted from 0), log lines after 1, 3, 5 and 6, and a last evaluation.
VARIATIONS = {
    "plain": [],
    "workers": ["DATALOADER.NUM_WORKERS", "2"],
    "accumulate": ["SOLVER.ACCUMULATE", "2", "MODEL.RETINANET.NORMALIZER", "per_image"],
    "ema": ["MODEL.RETINANET.NORMALIZER", "ema", "MODEL.FPN.NORM", "BN"],
    "no grouping": ["DATALOADER.ASPECT_RATIO_GROUPING", "False", "SEED", "-1"],
    "detectron2's mapper": ["INPUT.MAPPER", "DatasetMapper", "DATALOADER.NUM_WORKERS", "1"],
    "precise batch norm": ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"],
    "repeat": [*REPEAT, "RepeatFactorTrainingSampler"],
    "subset": ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler", "SEED", "-1"],
    "weighted": ["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"],
    "weighted categories": [*REPEAT, "WeightedCategoryTrainingSampler"],
    "two processes": ["MODEL.RETINANET.NORMALIZER", "ema"],
    "two processes with workers": [
        *("SOLVER.ACCUMULATE", "2", "DATALOADER.NUM_WORKERS", "1"),
        *("MODEL.RETINANET.NORMALIZER", "global"),
    ],
}


class Runner:
    """Trainings in processes of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.kills = 0
        self._whole = {}
        path = os.pathsep.join([str(RUNNER.parents[2]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout.readline() == "ready\n"

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def train(self, name, variation, *, at=None, resume=False, processes=None, **case):
        """Train in the folder ``name``; returns the exit codes of the processes."""
        if processes is None:
            processes = 2 if variation.startswith("two processes") else 1
        case |= {"folder": str(self.folder / name), "options": VARIATIONS[variation], "at": at}
        case |= {"resume": resume, "processes": processes, "keys": KEYS}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        if -9 in codes:
            self.kills += 1
        return codes

    def whole(self, variation):
        """The folder of an uninterrupted training, and the names of its moments."""
        if variation not in self._whole:
            name = f"whole {variation}"
            moments = self.folder / f"{name}.json"
            codes = self.train(name, variation, moments=str(moments))
            assert set(codes) == {0}, self.log(name)
            self._whole[variation] = json.loads(moments.read_text())
        return self.folder / f"whole {variation}", self._whole[variation]

    def log(self, name):
        return (self.folder / f"{name}.log0").read_text()

    def check_kills(self, variation, *kills):
        """Kill a training at these moments, one after the other, and let it end: all is equal.

        A moment is its number; after a resume it counts from there.
        """
        expected, _ = self.whole(variation)
        name = f"{variation} {kills}"
        for number, at in enumerate(kills):
            assert -9 in self.train(name, variation, at=at, resume=number > 0), self.log(name)
        assert set(self.train(name, variation, resume=True)) == {0}, self.log(name)
        assert_equal(self.folder / name, expected)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    native.unavailable()  # compiles the kernel now: its file is no moment of a training
    runner = Runner(tmp_path_factory.mktemp("runs"))
    yield runner
    runner.close()
    print(f"\nSIGKILLs survived: {runner.kills}")


def leaves(value, path=""):
    """(path, leaf) of nested dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in items:
            yield from leaves(entry, f"{path}/{key}")
    else:
        yield path, value


def is_equal(x, y):
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.equal(x, y)
    return x == y or (x != x and y != y)  # NaN is the AP of no box


def assert_same_leaves(found, expected):
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert found.keys() == expected.keys()
    assert [path for path in expected if not is_equal(found[path], expected[path])] == []


def checkpoint(path):
    """Everything in it but the clock: weights, buffers, momenta, schedule, generators, position."""
    loaded = torch.load(path, weights_only=True)
    resume = loaded.get("resume", {})
    if resume:
        resume["storage"] = [entry for entry in resume["storage"] if entry[0] not in TIMES]
        del resume["config"]  # names the folder
    return loaded


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_equal(found, expected, files=True):
    assert_same_leaves(metrics(found), metrics(expected))
    for name in ("model_final.pth", "model_best.pth"):
        assert_same_leaves(checkpoint(found / name), checkpoint(expected / name))
    for name in ("model_best.json", "last_checkpoint"):
        assert (found / name).read_text() == (expected / name).read_text()
    if files:  # also: nothing half written is left
        names = [
            sorted(p.name for p in folder.iterdir() if not p.name.startswith("events"))
            for folder in (found, expected)
        ]
        assert names[0] == names[1]


def moment(names, name, which=0):
    """The number of a moment, by its name."""
    return [number for number, found in enumerate(names) if found == name][which]


# Some of the moments below, which `make test` can afford.
@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("4 MB written", 3),  # of the checkpoint before an evaluation
        ("evaluation", 6),  # after that checkpoint
        ("after rename to model_best.pth", 1),  # before model_best.json
        ("evaluation", 9),  # the last one, after the training
    ],
)
def test_killed_training_ends_as_if_nothing_had_happened(runner, name, which):
    _, moments = runner.whole("plain")
    runner.check_kills("plain", moment(moments, name, which))


def test_signal_saves_and_stops(runner):
    """Exit code 75 after the iteration; a resumed training ends as if nothing had happened."""
    expected, moments = runner.whole("plain")
    at = moment(moments, "iteration 4")
    assert runner.train("signal", "plain", at=at, signal="SIGTERM") == [75]
    found = runner.folder / "signal"
    assert (found / "last_checkpoint").read_text() == "model_0000004.pth"
    assert "SIGTERM stopped the training after iteration 5, saved in" in runner.log("signal")
    assert "Traceback" not in runner.log("signal")
    assert runner.train("signal", "plain", resume=True) == [0]
    assert_equal(found, expected, files=False)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 107, 4))
def test_killed_at_many_moments(runner, at):
    """Of every kind: in an iteration, at each step of each file, in each evaluation."""
    assert len(runner.whole("plain")[1]) == 107
    runner.check_kills("plain", at)


@pytest.mark.slow
@pytest.mark.parametrize("variation", list(VARIATIONS)[1:])
def test_killed_in_each_variation(runner, variation):
    """Before, during and after a save, and in an evaluation."""
    _, moments = runner.whole(variation)
    last = len(moments) - 1 - moments[::-1].index("0 MB written")
    for at in (
        moment(moments, "iteration 3"),
        moment(moments, "4 MB written", 2),
        moment(moments, "evaluation", len([m for m in moments if m == "evaluation"]) // 2),
        last,
    ):
        runner.check_kills(variation, at)


@pytest.mark.slow
@pytest.mark.parametrize("variation", ["plain", "workers", "two processes"])
def test_killed_twice(runner, variation):
    """And a third time at the first moment after the resume."""
    _, moments = runner.whole(variation)
    first = moment(moments, "iteration 3")
    runner.check_kills(variation, first, 12, 0)


@pytest.mark.slow
@pytest.mark.parametrize("variation", ["plain", "workers"])
def test_killed_from_outside(runner, variation):
    """At random times, while it starts too, until it ends."""
    rng = random.Random(0)
    expected, _ = runner.whole(variation)
    start = time.monotonic()
    assert runner.train(f"timed {variation}", variation) == [0]
    duration = time.monotonic() - start  # at most .4 of it, so a second run does not end either
    name, kills, codes = f"outside {variation}", 0, [-9]
    while codes != [0] and kills < 12:
        limit = rng.uniform(0.1, 0.4) * duration
        codes = runner.train(name, variation, resume=kills > 0, seconds=limit)
        kills += codes == [-9]
    if codes != [0]:
        assert runner.train(name, variation, resume=True) == [0], runner.log(name)
    assert kills >= 2
    assert_equal(runner.folder / name, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_on_another_number_of_processes(runner, before, after):
    """It goes on, with a warning."""
    variation = "two processes" if before == 2 else "plain"
    _, moments = runner.whole(variation)
    name, at = f"{before} to {after}", moment(moments, "iteration 4")
    assert -9 in runner.train(name, variation, at=at, processes=before)
    assert set(runner.train(name, variation, resume=True, processes=after)) == {0}
    assert f"{after} process(es), in the checkpoint there were {before}" in runner.log(name)
    assert [line["iteration"] for line in metrics(runner.folder / name)][-1] == 7


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_signal_to_one_process_stops_all_after_the_same_iteration(runner, name, rank):
    """The others learn of it one iteration later."""
    variation, folder = "two processes", f"{name} to {rank}"
    expected, _ = runner.whole(variation)
    at = 6 if rank else moment(runner.whole(variation)[1], "iteration 2")
    codes = runner.train(folder, variation, at=at, at_rank=rank, signal=name)
    assert codes == [75, 75], runner.log(folder)
    assert set(runner.train(folder, variation, resume=True)) == {0}
    assert_equal(runner.folder / folder, expected, files=False)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 4, 8], ids=["without checkpoint", "after one", "last"])
def test_signal_in_an_evaluation_does_not_wait_for_its_end(runner, which):
    """What was before the evaluation is saved, and the resumed training repeats it."""
    expected, moments = runner.whole("plain")
    name, at = f"signal in evaluation {which}", moment(moments, "evaluation", which + 1)
    assert runner.train(name, "plain", at=at, signal="SIGTERM") == [75], runner.log(name)
    assert "SIGTERM stopped the training" in runner.log(name)
    assert runner.log(name).count("Start inference") == which // 4 + 1
    assert runner.train(name, "plain", resume=True) == [0]
    assert_equal(runner.folder / name, expected, files=False)


@pytest.mark.slow
def test_signals_do_not_reach_the_workers(runner):
    """As from a terminal, which signals all processes of the training."""
    expected, moments = runner.whole("workers")
    at = moment(moments, "iteration 4")
    assert runner.train("group", "workers", at=at, signal="SIGINT", group=True) == [75]
    assert runner.train("group", "workers", resume=True) == [0]
    assert_equal(runner.folder / "group", expected, files=False)
