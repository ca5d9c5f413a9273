"""What a case is, and how it is run: results are compared, then time and memory are measured."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["PEERS", "Case", "Result", "clock", "peak_memory", "run_case", "stopwatch"]

# How the names of the implementations that are not ours start.
PEERS = ("detectron2", "torchvision")

CLOCKS = ("CPU time of the process", "wall clock")

# Shorter runs are repeated within a round. One short run alone would be timed with cold caches,
# which the implementation before it filled with its own data.
_MIN_ROUND_SECONDS = 0.02


@dataclass
class Case:
    """Several implementations of the same work on the same inputs.

    Args:
        stage: what is timed: "loss", "matching", ...
        name: the size of the inputs, for the table.
        implementations: by name, functions that do the work once and return the result. Ratios are
            relative to the first.
        check: takes the result of every implementation by name and returns a sentence that says how
            closely they agree. It raises AssertionError if one is wrong.
        max_rounds: upper bound of the rounds, for slow cases.
        memory: False if torch's allocator does not see the memory that the work takes.
        prepare: by implementation, functions that make the inputs which a run consumes. They are
            called before each run; neither their time nor their memory counts.
    """

    stage: str
    name: str
    implementations: Mapping[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], str]
    max_rounds: int = 100
    memory: bool = True
    prepare: Mapping[str, Callable[[], None]] = field(default_factory=dict)

    def prepared(self, name: str) -> Callable[[], Any]:
        """The implementation ``name``, ready for one run."""
        if name in self.prepare:
            self.prepare[name]()
        return self.implementations[name]

    def results(self) -> dict[str, Any]:
        """The result of every implementation, for ``check``."""
        return {name: self.prepared(name)() for name in self.implementations}


@dataclass
class Result:
    """One implementation of one case, as it stands in the JSON file."""

    stage: str
    case: str
    implementation: str
    milliseconds: float  # median of the rounds, by the clock that the JSON file names
    wall_milliseconds: float  # median of the rounds, by the wall clock
    ratio: float | None  # times as fast as the first implementation, median of the rounds
    ratio_low: float | None
    ratio_high: float | None
    peak_bytes: int | None  # see peak_memory
    rounds: int
    agreement: str


def run_case(case: Case, rounds: int, device: str) -> list[Result]:
    """Compare the results of all implementations, then measure memory and time.

    The implementations take turns in every round, so that a slow phase of the machine meets all of
    them. A ratio is the median of the rounds' ratios.

    Args:
        case: what to run; ``case.max_rounds`` bounds ``rounds``.
        rounds: timed rounds. Two or more are preceded by a warm-up round, which also tells how
            often a short run is repeated within a round. A single round has no warm-up: comparing
            the results has run everything once.
        device: "cpu" or "cuda".

    Raises:
        AssertionError: results differ by more than the case allows.
    """
    agreement = case.check(case.results())
    gc.collect()
    peaks = {
        name: peak_memory(case.prepared(name), device) if case.memory else None
        for name in case.implementations
    }
    rounds = min(rounds, case.max_rounds)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in case.implementations}
    repeats = dict.fromkeys(case.implementations, 1)
    has_warm_up = rounds > 1
    for number in range(rounds + has_warm_up):
        for name in case.implementations:
            taken = stopwatch(case.prepared(name), device, repeats[name])
            if number or not has_warm_up:
                seconds[name].append(taken)
            elif name not in case.prepare:  # prepared inputs last for one run only
                repeats[name] = math.ceil(_MIN_ROUND_SECONDS / max(taken[1], 1e-6))
    which = CLOCKS.index(clock(device))
    baseline = next(iter(seconds.values()))
    results = []
    for name, taken_by in seconds.items():
        ratios = []
        if taken_by is not baseline:
            ratios = [base[which] / taken[which] for base, taken in zip(baseline, taken_by)]
        results.append(
            Result(
                case.stage,
                case.name,
                name,
                1e3 * statistics.median(taken[which] for taken in taken_by),
                1e3 * statistics.median(wall for _, wall in taken_by),
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
                peaks[name],
                rounds,
                agreement,
            )
        )
    return results


def clock(device: str) -> str:
    """Which clock ratios are computed from.

    CPU time does not count other programs that run on the machine. But it is the sum over threads,
    and it does not count a GPU's work. In these cases the wall clock is used.
    """
    return CLOCKS[0] if device == "cpu" and torch.get_num_threads() == 1 else CLOCKS[1]


def stopwatch(run: Callable[[], Any], device: str, times: int = 1) -> tuple[float, float]:
    """Seconds of one run: CPU time of the process, and wall clock; the mean of ``times`` runs."""
    _synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        run()
    _synchronize(device)
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """The most bytes that torch's allocator held at once during ``run``, minus those before it."""
    if device == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
