"""What was measured, as JSON and as a page.

``python -m reproduction.ledger`` writes docs/ledger.md from docs/ledger.json again.
"""

from __future__ import annotations

import fcntl
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reproduction.paper import Row, Table, checkout, load_paper

__all__ = ["Ledger", "summary"]

_HEADER = """# Ledger

Rows of the paper's tables beside what was measured with this code. Written by
`python -m reproduction.reproduce`; do not edit it by hand.
"""

_SCALES = {
    "paper": """## Paper scale

The rows as they are: COCO, the paper's models and schedule. No row has been run yet where nothing
is listed.
""",
    "mini": """## Mini scale

The rows' losses, samplers and anchors on the small model and the embedded digits of
`reproduction/mini.yaml`, from a backbone that has learned to classify digits, as the paper's has
learned ImageNet. AP is COCO's on the 200 images of `digits_scenes_val` and is not to be compared
with the paper's by its height: what counts is the order within a table.
""",
}


class Ledger:
    """The results of all runs, by scale and run key, in one JSON file.

    Args:
        path: the JSON; the page is written beside it, with the ending .md.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: dict[str, dict[str, dict[str, Any]]] = {}
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            self._data = json.loads(self.path.read_text())

    def runs(self, scale: str) -> dict[str, dict[str, Any]]:
        """Run key -> result (see :func:`reproduction.reproduce.outcome`)."""
        return self._data.get(scale, {})

    def record(self, scale: str, key: str, result: dict[str, Any]) -> None:
        """Add a result and write both files, so that nothing is lost if the rest is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()  # another command may have recorded something meanwhile
            self._data.setdefault(scale, {})[key] = result
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self._data, indent=1, sort_keys=True) + "\n")
            partial.replace(self.path)
            self.write_page()

    def add_rows(self, scale: str, key: str, rows: Sequence[str]) -> None:
        """Say of a result that it is that of these rows, too."""
        result = self.runs(scale)[key]
        if not set(rows) <= set(result["rows"]):
            self.record(scale, key, {**result, "rows": sorted({*result["rows"], *rows})})

    def write_page(self) -> None:
        """Write the table of every row that has a result, and the paper's claims."""
        pages = [_HEADER]
        for scale, introduction in _SCALES.items():
            measured = self._by_row(scale)
            if measured:
                tables = load_paper().values()
                pages += [introduction, *(_table(t, measured, scale) for t in tables)]
                pages.append(_claims(measured) if scale == "mini" else "")
        self.path.with_suffix(".md").write_text("\n".join(p for p in pages if p))

    def _by_row(self, scale: str) -> dict[str, list[dict[str, Any]]]:
        """ "TABLE ROW" -> results of its seeds. A run says itself which rows it is."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for _, result in sorted(self.runs(scale).items()):
            for row in result["rows"]:
                rows.setdefault(row, []).append(result)
        return rows


def summary(result: dict[str, Any]) -> str:
    """One line of a result."""
    if "diverged_at" in result:
        return f"diverged at iteration {result['diverged_at']}"
    numbers = ", ".join(f"{k} {result[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in result)
    return f"{numbers} in {result['seconds'] / 60:.1f} min"


def _table(table: Table, measured: dict[str, list[dict[str, Any]]], scale: str) -> str:
    rows = [r for r in table.rows if f"{r.table} {r.name}" in measured]
    if not rows:
        return ""
    split = table.split if scale == "paper" else "digits_scenes_val"
    lines = [
        f"### Table {table.key}: {table.title}" if table.key != "5.1" else f"### {table.title}",
        "",
        f"Paper: AP on {table.split}. Here: mean over seeds on {split}; spread is largest minus "
        "smallest.",
        "",
        "| row | paper AP | AP | difference | AP50 | AP75 | seeds | spread | minutes | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row, measured[f"{row.table} {row.name}"]) for row in rows]
    return "\n".join([*lines, ""])


def _row(row: Row, results: Sequence[dict[str, Any]]) -> str:
    paper = "diverges" if row.diverges else f"{row.metrics['AP']:.1f}"
    ended = [r for r in results if "AP" in r]
    diverged = [r["diverged_at"] for r in results if "diverged_at" in r]
    note = f"diverged at iteration {', '.join(map(str, diverged))}" if diverged else ""
    cells = [row.name, paper]
    if ended:
        ap = [r["AP"] for r in ended]
        mean = statistics.mean(ap)
        difference = "" if row.diverges else f"{mean - row.metrics['AP']:+.1f}"
        cells += [f"{mean:.1f}" + (f" ({note})" if note else ""), difference]
        cells += [f"{statistics.mean(r[m] for r in ended):.1f}" for m in ("AP50", "AP75")]
        cells += [str(len(results)), f"{max(ap) - min(ap):.1f}"]
    else:
        cells += [note, "", "", "", str(len(results)), ""]
    seconds = [r["seconds"] for r in results if "seconds" in r]
    cells.append(f"{statistics.mean(seconds) / 60:.1f}" if seconds else "")
    cells.append(", ".join(sorted({r["commit"] for r in results})))
    return f"| {' | '.join(cells)} |"


def _claims(measured: dict[str, list[dict[str, Any]]]) -> str:
    """The orderings that the paper found, and whether they show here."""
    text = (checkout() / "docs" / "paper.yaml").read_text(encoding="utf-8")
    lines = [
        "### The paper's orderings at this scale",
        "",
        "| claim | better row | the other | shows |",
        "|---|---|---|---|",
    ]
    notes = []
    for claim in yaml.safe_load(text).get("claims", []):
        measure = claim.get("measure", "AP")
        others = claim["worse"] if isinstance(claim["worse"], list) else [claim["worse"]]
        others = [row for row in others if row in measured]
        better = measured.get(claim["better"], [])
        if not better or not others:
            continue
        # of several others, the claim is about the best one measured
        other = max(others, key=lambda row: _mean(measured[row], "AP") or 0.0)
        worse = measured[other]
        values = [_mean(results, measure) for results in (better, worse)]
        verdict = _shows(claim, values, [better, worse])
        shown = ["diverged" if v is None else f"{v:.1f}" for v in values]
        name = "" if measure == "AP" else f"{measure.replace('_', ' ')} "
        lines.append(
            f"| {claim['text']} | {claim['better']}: {name}{shown[0]} "
            f"| {other}: {name}{shown[1]} | {verdict} |"
        )
        if "note" in claim:
            notes.append(f"- {claim['text']}: {' '.join(claim['note'].split())}")
    return "\n".join([*lines, "", *notes, ""])


def _mean(results: Sequence[dict[str, Any]], measure: str) -> float | None:
    values = [r[measure] for r in results if measure in r]
    return statistics.mean(values) if values else None


def _shows(
    claim: dict[str, Any], values: Sequence[float | None], results: Sequence[Sequence[dict]]
) -> str:
    better, worse = values
    if worse is None and better is not None:
        return "yes: the other diverged"
    if better is None or worse is None:
        return "no: diverged"
    if "within" in claim:
        close = abs(better - worse) <= claim["within"]
        return f"{'yes' if close else '**no**'}: {better - worse:+.1f} (within {claim['within']})"
    if claim.get("measure") == "early_loss":  # of which less is better
        return f"{'yes' if better < worse else '**no**'}: {worse / better:.0f}x"
    spreads = [max(v) - min(v) for v in ([r["AP"] for r in rs if "AP" in r] for rs in results)]
    difference = better - worse
    word = "yes" if difference > 0 else "**no**"
    doubt = ", within the seeds' spread" if abs(difference) <= max(spreads) else ""
    return f"{word}: {difference:+.1f}{doubt}"


def main() -> None:
    ledger = Ledger(checkout() / "docs" / "ledger.json")
    ledger.write_page()
    print(f"ledger: {ledger.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
