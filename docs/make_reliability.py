"""Write docs/reliability.md from the tests: ``make docs``. ``--check``: do all named tests exist?

The rows are the faults of tests/faults/faults.py and those of docs/reliability.yaml, the numbers
those of tests/faults/detectron2_outcomes.json and tests/fuzz/record.json.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT))  # tests, which are not installed

from tests.faults.faults import FAULTS  # noqa: E402
from tests.faults.planting import Fault  # noqa: E402

INTRODUCTION = """\
# Reliability

What happens when something goes wrong, which test shows it, and what does Detectron2 do then?

This page is generated from the tests by `make docs`. Rows with the test "planted" are cases of
`tests/faults/test_faults.py`: the fault is put into a small dataset, config or weights file, and
the command is run. "One line" is `error: ...` with the file or key and what to do, exit status 1,
and no traceback. "The same numbers" are losses, AP and detections equal to the bit to those of the
run without the fault.
"""

DETECTRON2 = """\
Detectron2's outcomes of the planted faults were recorded on {date} by
`python -m tests.faults.detectron2_outcomes`, which gives the same files and the same YAML to its
`RetinaNet`, `DefaultTrainer` and `COCOEvaluator` (torch {torch}, fvcore {fvcore}, pycocotools
{pycocotools}). Those of the other rows come from trials with the same trainer on torch 2.14.1.
"Ends well" is exit status 0. After two iterations AP is near 0, so a wrong test set changes it
little here: with a detector of AP 46.8, another order of classes gave AP 2.7 without a word.
"""


def page() -> str:
    settings = yaml.safe_load((ROOT / "docs" / "reliability.yaml").read_text())["sections"]
    recorded = json.loads((ROOT / "tests/faults/detectron2_outcomes.json").read_text())
    parts = [INTRODUCTION, figures(settings), DETECTRON2.format(**recorded | recorded["versions"])]
    for section in settings:
        rows = [*planted(section, recorded["faults"]), *others(section)]
        lines = ["fault | what happens | test | Detectron2", "--- | --- | --- | ---"]
        table = "\n".join(f"| {line} |" for line in [*lines, *map(" | ".join, rows)])
        text = f"{section['text']}\n\n" if "text" in section else ""
        for other, link in section.get("links", {}).items():
            text += f"{link}\n\n" if (ROOT / "docs" / other).is_file() else ""
        parts.append(f"## {section['name']}\n\n{text}{table}\n")
    return "\n".join(parts)


def planted(section: dict[str, Any], outcomes: dict[str, str]) -> Iterator[list[str]]:
    for fault in FAULTS:
        if fault.section in section.get("planted", ()):
            theirs = outcomes.get(f"{fault.section}: {fault.what}", "not recorded yet")
            name = f"{fault.section.split(',')[0]}: {fault.what}"
            yield [_cell(name), _cell(happens(fault)), "planted", _cell(theirs)]


def happens(fault: Fault) -> str:
    if fault.outcome == "error":
        return f"one line: `{_plain(fault.says)}`"
    if fault.outcome == "warning":
        return f"a warning: `{_plain(fault.says)}`"
    return "the same numbers"


def _plain(pattern: str) -> str:
    """A regular expression as a reader would write the text that it matches."""
    first = pattern.split("|")[0]
    return first.replace(".*", " ... ").replace("\\", "").strip()


def others(section: dict[str, Any]) -> Iterator[list[str]]:
    for row in section.get("rows", ()):
        file, _, name = row["test"].partition("::")
        link = f"[`{name}`](../{file})" if (ROOT / file).is_file() else f"`{name}`"
        yield [_cell(row["fault"]), _cell(row["happens"]), link, _cell(row["detectron2"])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def figures(settings: list[dict[str, Any]]) -> str:
    rows = [row for section in settings for row in section.get("rows", ())]
    kills = sum(count_cases(row["test"]) for row in rows if row.get("kills"))
    lines = [
        f"- **At least {kills} trainings killed** with SIGKILL, some several times; each ended "
        "with the bits of one that nobody killed.",
        f"- **{len(FAULTS) + len(rows)} faults**: {len(FAULTS)} planted in files, {len(rows)} in "
        "tests of their own.",
    ]
    record = ROOT / "tests" / "fuzz" / "record.json"
    if record.is_file():
        fuzz = json.loads(record.read_text())
        inputs = ", ".join(f"{part} {n:,}" for part, n in fuzz["inputs"].items())
        lines.append(
            f"- **{sum(fuzz['inputs'].values()):,} inputs** tried by the fuzz tests in "
            f"{fuzz['minutes']} minutes (hypothesis {fuzz['hypothesis']}), without another outcome "
            f"than the stated ones: {inputs}."
        )
    return "\n".join(lines) + "\n"


@functools.cache
def _functions(file: str) -> dict[str, ast.FunctionDef]:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def count_cases(test: str) -> int:
    """The number of cases of a test, at least: a list that is computed counts as one."""
    file, _, name = test.partition("::")
    function = _functions(file).get(name)
    calls = [d for d in function.decorator_list if isinstance(d, ast.Call)] if function else []
    return math.prod(_length(call.args[1]) for call in calls if len(call.args) > 1) * bool(function)


def _length(values: ast.expr) -> int:
    if isinstance(values, (ast.List, ast.Tuple)):
        return len(values.elts)
    if isinstance(values, ast.Call) and getattr(values.func, "id", "") == "range":
        return len(range(*(ast.literal_eval(argument) for argument in values.args)))
    return 1


def missing_tests() -> list[str]:
    """The tests that are named and do not exist."""
    settings = yaml.safe_load((ROOT / "docs" / "reliability.yaml").read_text())["sections"]
    named = [row["test"] for section in settings for row in section.get("rows", ())]
    return [
        test for test in named if test.partition("::")[2] not in _functions(test.split("::")[0])
    ]


def main() -> None:
    missing = missing_tests()
    for test in missing:
        print(f"missing: {test}", file=sys.stderr)
    if "--check" in sys.argv[1:]:
        stale = PAGE.read_text() != page()
        sys.exit(f"{PAGE.name} is not what `make docs` writes" if stale else bool(missing))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
