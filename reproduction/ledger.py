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

from reproduction.claims import judged, notes, resampled, seed_spread
from reproduction.intervals import SeedSpread, interval
from reproduction.paper import Claim, Table, checkout, load_claims, load_paper
from reproduction.plan import MINI_DATASET, is_current
from retina_plugin.errors import ConfigError, first_line

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
    "mini": f"""## Mini scale

Each row's loss, sampler and anchors on a small model and the embedded sparse scenes
(`reproduction/mini.yaml`). The backbone was first trained to classify digits, as the paper's was
trained on ImageNet. AP is COCO's, on the 500 images of `{MINI_DATASET}`. Compare the order of
the rows of a table, not their AP with the paper's: the images and the model are different.

An interval is the 95 % confidence interval of a row's mean, over test images and seeds. What seeds
add is measured on all rows together, and for a row that varies far more, on its own seeds
(`reproduction/intervals.py`).
""",
}


class Ledger:
    """The results of all runs, by scale and run key, in one JSON file.

    Args:
        path: the JSON file; the page is written beside it, with the suffix .md.
        claims: the orderings that the page looks for; None for those of ``docs/paper.yaml``.

    Raises:
        ConfigError: the file is there and is something else.
    """

    def __init__(self, path: Path = LEDGER, claims: Sequence[Claim] | None = None) -> None:
        self.path = path
        self.claims = load_claims() if claims is None else claims
        self._data: dict[str, dict[str, dict[str, Any]]] = {}
        self._read()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            for runs in data.values():
                for key, result in runs.items():
                    if not isinstance(result["rows"], list) or not isinstance(result["opts"], list):
                        raise TypeError(f"{key} has no rows and overrides")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} is not a ledger of reproduction.reproduce: {first_line(error)}"
            ) from None
        self._data = data

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
            partial.write_text(_json(self._data))
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
            if self.runs(scale):
                measured = self.by_row(scale)
                spread = seed_spread(measured)
                tables = load_paper().values()
                pages += [introduction, *(_table(t, measured, scale, spread) for t in tables)]
                if scale == "mini":
                    pages.append(_claims(self.claims, measured))
                pages.append(self._with_other_settings(scale, spread))
        self.path.with_suffix(".md").write_text("\n".join(p for p in pages if p))

    def by_row(self, scale: str) -> dict[str, list[dict[str, Any]]]:
        """ "TABLE ROW" -> the results of its seeds, with the settings that its configs have now."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for key, result in sorted(self.runs(scale).items()):
            for row in result["rows"]:
                if is_current(key, row, scale):
                    rows.setdefault(row, []).append(result)
        return rows

    def _with_other_settings(self, scale: str, spread: SeedSpread) -> str:
        """The table of the runs with ``--set``, and of those whose configs were changed since."""
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for key, result in sorted(self.runs(scale).items()):
            names = ", ".join(row for row in result["rows"] if not is_current(key, row, scale))
            if names:
                changed = f"`{' '.join(result['set'])}`" if "set" in result else "earlier configs"
                experiment = key.rpartition("-seed")[0]
                found.setdefault((changed, names, experiment), []).append(result)
        if not found:
            return ""
        lines = [
            "### Rows with other settings",
            "",
            "| settings | row | AP | 95 % interval | AP50 | AP75 | seeds | minutes | commit |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for (changed, names, _), results in found.items():
            lines.append(f"| {changed} | {names} | {' | '.join(_cells(results, spread))} |")
        return "\n".join([*lines, ""])


def summary(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "diverged_at" in result:
        return f"diverged at iteration {result['diverged_at']}"
    numbers = ", ".join(f"{k} {result[k]:.1f}" for k in ("AP", "AP50", "AP75") if k in result)
    return f"{numbers} in {result['seconds'] / 60:.1f} min"


def _json(data: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One line for each run."""
    scales = []
    for scale, runs in sorted(data.items()):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(result, sort_keys=True)}"
            for key, result in sorted(runs.items())
        ]
        scales.append(f" {json.dumps(scale)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(scales) + "\n}\n"


def _table(
    table: Table, measured: dict[str, list[dict[str, Any]]], scale: str, spread: SeedSpread
) -> str:
    rows = [row for row in table.rows if str(row) in measured]
    if not rows:
        return ""
    split = table.split if scale == "paper" else MINI_DATASET
    where = f"Table {table.key}" if table.key != "5.1" else "Section 5.1"
    lines = [
        f"### {where}: {table.title}",
        "",
        f"Paper ({table.section}): AP on {table.split}. Here: mean AP of the seeds on {split}.",
        "",
        "| row | paper AP | AP | 95 % interval | AP50 | AP75 | seeds | minutes | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = "diverges" if row.diverges else f"{row.metrics['AP']:.1f}"
        cells = _cells(measured[str(row)], spread)
        lines.append(f"| {row.name} | {paper} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cells(results: Sequence[dict[str, Any]], spread: SeedSpread) -> list[str]:
    """AP, its interval, AP50, AP75, seeds, minutes and commit of a row's results."""
    ended = [r for r in results if "AP" in r]
    diverged = [r["diverged_at"] for r in results if "diverged_at" in r]
    note = f"diverged at iteration {', '.join(map(str, diverged))}" if diverged else ""
    cells = [note, "", "", ""]
    if ended:
        mean = statistics.mean(r["AP"] for r in ended)
        cells = [f"{mean:.1f}" + (f" ({note})" if note else ""), ""]
        if runs := resampled(ended):
            low, high = interval(runs, mean, spread)
            cells[1] = f"{low:.1f} to {high:.1f}"
        cells += [f"{statistics.mean(r[m] for r in ended):.1f}" for m in ("AP50", "AP75")]
    seconds = [r["seconds"] for r in results if "seconds" in r]
    minutes = f"{statistics.mean(seconds) / 60:.1f}" if seconds else ""
    commits = ", ".join(sorted({r["commit"] for r in results}))
    return [*cells, str(len(results)), minutes, commits]


def _claims(claims: Sequence[Claim], measured: dict[str, list[dict[str, Any]]]) -> str:
    """The orderings that the paper reports, and whether the results here show them."""
    found = list(judged(claims, measured))
    if not found:
        return ""
    lines = [
        "### Which of the paper's orderings show at this scale",
        "",
        "In brackets, the 95 % interval of the difference. A difference is clear if 0 lies outside "
        'of it; "within 2" is clear if 2 and -2 do.',
        "",
        "| the paper's claim | better row | compared with | does it show? |",
        "|---|---|---|---|",
    ]
    for claim, judgement in found:
        lines.append(f"| {' | '.join([claim.text, *judgement.rows, judgement.verdict])} |")
    return "\n".join([*lines, "", notes(found)])


def main() -> None:
    ledger = Ledger()
    ledger.write_page()
    print(f"ledger: {ledger.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
