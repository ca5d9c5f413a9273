"""The benchmark of exported files: what it says of detections that differ, and of what fails."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.export import CASES
from benchmarks.formats import Formats, Row, agreement

BOXES = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
FOUND = BOXES, np.array([0.9, 0.5], np.float32), np.array([1, 2])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (FOUND, "equal"),
        ((BOXES + 0.01, FOUND[1] - 0.001, FOUND[2]), "1e-02 px, 1e-03 of scores"),
        ((BOXES[:1], FOUND[1][:1], FOUND[2][:1]), "1 of 2 again within 2 px"),
        ((BOXES, FOUND[1], FOUND[2][::-1]), "0 of 2 again within 2 px"),
        ((BOXES[:0], FOUND[1][:0], FOUND[2][:0]), "0 of 2 again within 2 px"),
    ],
)
def test_agreement(found, words):
    assert agreement(FOUND, found) == words


def test_what_fails_is_a_row_with_its_first_line():
    """The others are timed without it."""

    def fails():
        raise RuntimeError("\x1b[31mno such operator\x1b[0m\nand where")

    formats = Formats("case", lambda: FOUND)
    formats.add("works", lambda: (lambda: FOUND, 2_000_000))
    formats.add("fails", fails)
    eager, works, failed = formats.timed(rounds=1)
    assert failed == Row("case", "fails", error="RuntimeError: no such operator")
    assert works.megabytes == 2 and works.milliseconds > 0 and works.ratio > 0
    assert eager.agreement == "2 detections" and eager.ratio is None


def test_published_rows_have_the_fields_of_a_row(repo):
    """docs/benchmarks/export.json can be read by the generator and continued by the command."""
    rows = json.loads((repo / "docs" / "benchmarks" / "export.json").read_text())["rows"]
    assert {row["case"] for row in rows} <= set(CASES.values())
    assert [asdict(Row(**row)) for row in rows] == rows
