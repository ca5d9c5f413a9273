"""The results of all runs: ``docs/ledger.json``, and ``docs/ledger.md`` with their tables.

``python -m reproduction.ledger`` writes the page again from the JSON.
"""

from __future__ import annotations

import fcntl
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduction.paper import Claim, Row, Table, checkout, load_claims, load_paper

__all__ = ["Ledger", "summary"]

LEDGER = checkout() / "docs" / "ledger.json"

_HEADER = """# Ledger

The paper's AP, and the AP that this code reached. `python -m reproduction.reproduce` writes this
page; do not edit it by hand.
"""

_SCALES = {
    "paper": """## Paper scale

COCO, with the paper's models and schedule. A row that is not listed has not been run yet.
""",
    "mini": """## Mini scale

Each row's loss, sampler and anchors on a small model and the embedded digits
(`reproduction/mini.yaml`). The backbone was first trained to classify digits, as the paper's was
trained on ImageNet. AP is COCO's, on the 200 images of `digits_scenes_val`. Compare the order of
the rows of a table, not their AP with the paper's: the images and the model are different.
""",
}


class Ledger:
    """The results of all runs, by scale and run key, in one JSON file.

    Args:
        path: the JSON file; the page is written beside it, with the suffix .md.
        claims: the orderings that the page looks for; None for those of ``docs/paper.yaml``.
    """

    def __init__(self, path: Path = LEDGER, claims: Sequence[Claim] | None = None) -> None:
        self.path = path
        self.claims = load_claims() if claims is None else claims
        self._data: dict[str, dict[str, dict[str, Any]]] = {}
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            self._data = json.loads(self.path.read_text())

    def runs(self, scale: str) -> dict[str, dict[str, Any]]:
        """Run key -> result, as :func:`reproduction.reproduce.outcome` gives it."""
        return self._data.get(scale, {})

    def record(self, scale: str, key: str, result: dict[str, Any]) -> None:
        """Add a result and write both files now: an interruption loses no finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()  # another process may have added results
            self._data.setdefault(scale, {})[key] = result
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self._data, indent=1, sort_keys=True) + "\n")
            partial.replace(self.path)
            self.write_page()

    def add_rows(self, scale: str, key: str, rows: Sequence[str]) -> None:
        """Note that a result is also the result of these rows."""
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
                pages.append(_claims(self.claims, measured) if scale == "mini" else "")
        self.path.with_suffix(".md").write_text("\n".join(p for p in pages if p))

    def _by_row(self, scale: str) -> dict[str, list[dict[str, Any]]]:
        """ "TABLE ROW" -> the results of its seeds."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for _, result in sorted(self.runs(scale).items()):
            for row in result["rows"]:
                rows.setdefault(row, []).append(result)
        return rows


def summary(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "diverged_at" in result:
        return f"diverged at iteration {result['diverged_at']}"
    numbers = ", ".join(f"{k} {result[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in result)
    return f"{numbers} in {result['seconds'] / 60:.1f} min"


def _table(table: Table, measured: dict[str, list[dict[str, Any]]], scale: str) -> str:
    rows = [row for row in table.rows if str(row) in measured]
    if not rows:
        return ""
    split = table.split if scale == "paper" else "digits_scenes_val"
    where = f"Table {table.key}" if table.key != "5.1" else "Section 5.1"
    lines = [
        f"### {where}: {table.title}",
        "",
        f"Paper ({table.section}): AP on {table.split}. Here: mean AP of the seeds on {split}. The "
        "spread is the largest AP of the seeds minus the smallest.",
        "",
        "| row | paper AP | AP | difference | AP50 | AP75 | seeds | spread | minutes | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row, measured[str(row)]) for row in rows]
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


def _claims(claims: Sequence[Claim], measured: dict[str, list[dict[str, Any]]]) -> str:
    """The orderings that the paper reports, and whether the results here show them."""
    lines = [
        "### Which of the paper's orderings show at this scale",
        "",
        "| the paper's claim | better row | compared with | does it show? |",
        "|---|---|---|---|",
    ]
    notes = []
    for claim in claims:
        others = [row for row in claim.worse if row in measured]
        if claim.better not in measured or not others:
            continue
        other = max(others, key=lambda row: _mean(measured[row], "AP") or 0.0)
        results = measured[claim.better], measured[other]
        name = "" if claim.measure == "AP" else f"{claim.measure.replace('_', ' ')} "
        cells = [claim.text]
        for row, of_row in zip((claim.better, other), results):
            value = _mean(of_row, claim.measure)
            cells.append(f"{row}: {name}" + ("diverged" if value is None else f"{value:.1f}"))
        lines.append(f"| {' | '.join(cells)} | {_verdict(claim, *results)} |")
        if claim.note:
            notes.append(f"- {claim.text}: {claim.note}")
    return "\n".join([*lines, "", *notes, ""])


def _mean(results: Sequence[dict[str, Any]], measure: str) -> float | None:
    values = [r[measure] for r in results if measure in r]
    return statistics.mean(values) if values else None


def _verdict(
    claim: Claim, better_results: Sequence[dict[str, Any]], worse_results: Sequence[dict[str, Any]]
) -> str:
    better, worse = (_mean(r, claim.measure) for r in (better_results, worse_results))
    if worse is None and better is not None:
        return "yes: the other diverged"
    if better is None or worse is None:
        return "no: diverged"
    if claim.within is not None:
        close = abs(better - worse) <= claim.within
        return f"{'yes' if close else '**no**'}: {better - worse:+.1f} (within {claim.within})"
    if claim.measure == "early_loss":
        return f"{'yes' if better < worse else '**no**'}: {worse / better:.0f}x"
    seeds = [[r["AP"] for r in results if "AP" in r] for results in (better_results, worse_results)]
    largest_spread = max(max(ap) - min(ap) for ap in seeds)
    difference = better - worse
    doubt = ", within the seeds' spread" if abs(difference) <= largest_spread else ""
    return f"{'yes' if difference > 0 else '**no**'}: {difference:+.1f}{doubt}"


def main() -> None:
    ledger = Ledger()
    ledger.write_page()
    print(f"ledger: {ledger.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
