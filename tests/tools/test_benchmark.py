"""The benchmark's arithmetic, and that what it compares agrees."""

import json
from itertools import islice

import pytest
import torch

from retina_plugin.tools import benchmark, contests, contests_pipeline
from retina_plugin.tools.contests import Contest


def test_ratios_are_of_the_rounds_against_the_first(monkeypatch):
    """Medians after a warm-up round, in turns; the spread is that of the rounds."""
    clock = iter([9.0, 9.0, 4.0, 2.0, 6.0, 1.0, 8.0, 2.0])  # warm-up, then peer and ours in turns
    order = []

    def stopwatch(run, device):
        run()
        took = next(clock)
        return took, took + 100

    monkeypatch.setattr(benchmark, "stopwatch", stopwatch)
    contest = Contest(
        "stage",
        "name",
        {"detectron2": lambda: order.append("theirs"), "ours": lambda: order.append("ours")},
        lambda results: "equal",
        memory=False,
    )
    theirs, ours = benchmark.compare(contest, rounds=3, device="cpu")
    assert order == ["theirs", "ours"] * 5  # the check, the warm-up, three rounds
    assert (theirs.milliseconds, theirs.ratio) == (6000.0, None)
    assert (ours.milliseconds, ours.ratio, ours.ratio_low, ours.ratio_high) == (2000.0, 4, 2, 6)
    assert ours.wall_milliseconds == 102000.0 and ours.agreement == "equal"


def test_nothing_is_timed_that_does_not_agree(monkeypatch):
    """A wrong result ends the benchmark before a time is taken."""
    monkeypatch.setattr(benchmark, "stopwatch", None)

    def check(results):
        assert results["ours"] == results["detectron2"]

    contest = Contest("stage", "name", {"detectron2": lambda: 1, "ours": lambda: 2}, check)
    with pytest.raises(AssertionError):
        benchmark.compare(contest, rounds=1, device="cpu")


def test_peak_memory_is_the_most_at_a_time():
    """Freed tensors do not count twice."""

    def run():
        for _ in range(5):
            torch.zeros(1 << 18)  # 1 MiB
        return torch.zeros(1 << 18) + torch.zeros(1 << 18)  # three at once

    assert 3 << 20 <= benchmark.peak_memory(run, "cpu") < 4 << 20


def test_the_command_writes_json_and_a_picture(monkeypatch, tmp_path, capsys):
    """Of a stage that takes a moment; the ratios in the file are those in the table."""
    quick = Contest(
        "matching",
        "tiny",
        {"detectron2": lambda: torch.ones(1 << 22).sum(), "ours": lambda: torch.ones(8).sum()},
        lambda results: "not compared",
    )
    monkeypatch.setitem(benchmark.STAGES, "matching", lambda device: iter([quick]))
    benchmark.main(["--stage", "matching", "--rounds", "2", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "cpu.json").read_text())
    ours = written["results"][1]
    assert ours["contender"] == "ours" and ours["ratio"] > 1
    assert f"{ours['ratio']:.2f}x" in capsys.readouterr().out
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "cpu.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_line():
    """What is missing, without a traceback."""
    with pytest.raises(SystemExit, match="error: --device cuda: torch sees no CUDA device here"):
        benchmark.main(["--device", "cuda"])


def agreements(stage, **sizes):
    """Each contest of a stage is run once and checked."""
    for contest in stage("cpu", **sizes):
        results = {name: run() for name, run in contest.contenders.items()}
        yield contest.check(results), contest, results


@pytest.mark.parametrize("stage", [contests.matching, contests.postprocess])
def test_stages_agree(stage):
    """Ours against Detectron2's, at the size that is timed; of matching up to 20 boxes."""
    said = [said for said, *_ in islice(agreements(stage), 2)]
    assert len(said) == 2 and all("equal to the bit" in one for one in said)


def test_checks_see_a_wrong_result():
    """A label, a class or a pixel that is not Detectron2's fails the contest's own check."""
    _, contest, results = next(agreements(contests.matching))
    results["ours"].label[7] += 1
    with pytest.raises(AssertionError):
        contest.check(results)
    _, contest, results = next(agreements(contests.postprocess))
    results["ours"].pred_classes[0] += 1
    with pytest.raises(AssertionError):
        contest.check(results)
    _, contest, results = next(agreements(contests_pipeline.mapper))
    results["ours"][0]["image"][0, 0, 0] ^= 8
    with pytest.raises(AssertionError):
        contest.check(results)


def test_evaluation_agrees_on_few_images():
    """All metrics, of each class too."""
    ((said, *_),) = agreements(contests_pipeline.evaluate, num_images=30, num_classes=3)
    assert said.startswith("9 numbers equal")
