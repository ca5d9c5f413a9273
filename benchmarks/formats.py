"""One format of an exported detector: its row of the table, its agreement, its time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.case import Case, run_case

__all__ = ["Detections", "Formats", "Row", "Run", "agreement"]

Detections = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, scores, classes
Run = Callable[[], Detections]


@dataclass
class Row:
    """One format of one case. ``error``: of the export, or of running its file."""

    case: str
    format: str
    megabytes: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None  # times as fast as eager PyTorch, median of the rounds
    agreement: str = ""
    ap_difference: float | None = None
    error: str = ""


class Formats:
    """Files of one case: written, compared with eager PyTorch, then timed in turns."""

    def __init__(self, case: str, eager: Run) -> None:
        self.case, self.expected = case, eager()
        self.runs: dict[str, Run] = {"PyTorch, eager": eager}
        count = f"{len(self.expected[1])} detections"
        self.rows = {"PyTorch, eager": Row(self.case, "PyTorch, eager", agreement=count)}

    def add(self, name: str, make: Callable[[], tuple[Run, int]]) -> None:
        """``make`` writes a file and returns how it is run, and its bytes. It may fail."""
        row = self.rows[name] = Row(self.case, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run, size = make()
                found = run()
        except Exception as error:  # what a library's export raises: it is what is reported
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error))  # colours
            lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
            row.error = f"{type(error.__cause__ or error).__name__}: {lines[0][:160]}"
            print(f"{self.case}: {name}: {row.error}", flush=True)
            return
        row.megabytes = size / 1e6
        row.agreement = agreement(self.expected, found)
        self.runs[name] = run
        print(f"{self.case}: {name}: {row.agreement}", flush=True)

    def timed(self, rounds: int) -> list[Row]:
        """All rows, after the files have been run in turns."""
        case = Case("export", self.case, self.runs, lambda results: "", memory=False)
        for result in run_case(case, rounds, "cpu"):
            row = self.rows[result.implementation]
            row.milliseconds, row.ratio = result.milliseconds, result.ratio
        return list(self.rows.values())


def agreement(expected: Detections, found: Detections) -> str:
    """How close detections are, in words: the largest differences, or how many were found again."""
    boxes, scores, classes = expected
    if len(found[1]) == len(scores) and np.array_equal(found[2], classes):
        pixels = float(np.abs(found[0] - boxes).max(initial=0))
        score = float(np.abs(found[1] - scores).max(initial=0))
        if pixels < 0.5:
            return "equal" if pixels == score == 0 else f"{pixels:.0e} px, {score:.0e} of scores"
    again = 0
    for box, class_ in zip(boxes, classes):
        near = np.abs(found[0] - box).max(axis=1) < 2 if len(found[0]) else np.zeros(0, bool)
        again += bool((near & (found[2] == class_)).any())
    return f"{again} of {len(scores)} again within 2 px"
