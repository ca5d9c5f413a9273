"""How a case is run: turns, rounds, repeats, clocks, ratios and memory."""

import time

import pytest
import torch

from benchmarks import case as case_module
from benchmarks.case import Case, clock, peak_memory, run_case


def case_of(implementations, check=lambda results: "equal", **options):
    return Case("stage", "name", implementations, check, **{"memory": False, **options})


def test_ratios_are_medians_of_the_rounds(monkeypatch):
    """Implementations take turns; the warm-up does not count; low and high are of the rounds."""
    seconds = iter([9.0, 9.0, 4.0, 2.0, 6.0, 1.0, 8.0, 2.0])  # warm-up, then three rounds
    order = []

    def stopwatch(run, device, times):
        run()
        taken = next(seconds)
        return taken, taken + 100

    monkeypatch.setattr(case_module, "stopwatch", stopwatch)
    case = case_of(
        {"detectron2": lambda: order.append("peer"), "ours": lambda: order.append("ours")}
    )
    peer, ours = run_case(case, rounds=3, device="cpu")
    assert order == ["peer", "ours"] * 5  # the check, the warm-up, three rounds
    assert (peer.milliseconds, peer.ratio) == (6000.0, None)
    assert (ours.milliseconds, ours.ratio, ours.ratio_low, ours.ratio_high) == (2000.0, 4, 2, 6)
    assert ours.wall_milliseconds == 102000.0 and ours.agreement == "equal"


def test_single_round_has_no_warm_up(monkeypatch):
    """It is run once and counts; inputs are prepared before each run, outside the stopwatch."""
    order = []

    def stopwatch(run, device, times):
        order.append("start")
        run()
        return 1.0, 1.0

    monkeypatch.setattr(case_module, "stopwatch", stopwatch)
    case = case_of(
        {"ours": lambda: order.append("run")}, prepare={"ours": lambda: order.append("prepare")}
    )
    (ours,) = run_case(case, rounds=1, device="cpu")
    assert order == ["prepare", "run", "prepare", "start", "run"] and ours.rounds == 1


def test_short_runs_are_repeated_within_a_round():
    """The time is that of one run. Runs that consume prepared inputs are not repeated."""
    runs = {"short": 0, "long": 0, "prepared": 0}

    def sleeper(name, seconds):
        def run():
            runs[name] += 1
            time.sleep(seconds)

        return run

    case = case_of(
        {
            "short": sleeper("short", 0.005),
            "long": sleeper("long", 0.025),
            "prepared": sleeper("prepared", 0),
        },
        prepare={"prepared": lambda: None},
    )
    short, _, _ = run_case(case, rounds=2, device="cpu")
    # the check and the warm-up, then two rounds
    assert runs["long"] == runs["prepared"] == 2 + 2
    assert runs["short"] > 2 + 2 and (runs["short"] - 2) % 2 == 0
    assert short.wall_milliseconds < 5 * (runs["short"] - 2) / 2


def test_several_threads_are_timed_by_wall_clock(monkeypatch):
    """CPU time adds up over threads, so it would hide their speed."""
    seconds = {"peer": (4.0, 2.0), "ours": (6.0, 1.0)}
    monkeypatch.setattr(case_module, "stopwatch", lambda run, device, times: seconds[run()])
    case = case_of({"detectron2": lambda: "peer", "ours": lambda: "ours"})
    assert clock("cpu") == "CPU time of the process"
    assert run_case(case, 1, "cpu")[1].ratio == pytest.approx(4 / 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock("cpu") == "wall clock"
    assert run_case(case, 1, "cpu")[1].ratio == 2


def test_wrong_result_is_not_timed(monkeypatch):
    """It ends the benchmark before a time is taken."""
    monkeypatch.setattr(case_module, "stopwatch", None)

    def check(results):
        assert results["ours"] == results["detectron2"]

    case = case_of({"detectron2": lambda: 1, "ours": lambda: 2}, check)
    with pytest.raises(AssertionError):
        run_case(case, rounds=1, device="cpu")


def test_peak_memory_is_what_is_held_at_once():
    """Tensors that were freed do not count."""

    def run():
        for _ in range(5):
            torch.zeros(1 << 18)  # 1 MiB
        return torch.zeros(1 << 18) + torch.zeros(1 << 18)  # three at once

    assert 3 << 20 <= peak_memory(run, "cpu") < 4 << 20
