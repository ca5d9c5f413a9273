"""Write ``docs/evidence.md``: which of the paper's claims show at the mini scale, with pictures.

    python -m reproduction.evidence

Trains what the ledger and the pictures need and what is not there yet: with the repository's ledger
the four runs of the pictures, without it all (some hours). Everything is drawn from the ledger and
from the folders of those runs.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

from reproduction.claims import Judgement, judged, notes
from reproduction.ledger import LEDGER, Ledger
from reproduction.paper import Claim, checkout
from reproduction.plan import MINI_DATASET, MINI_TABLES, plan, select_rows
from reproduction.plots import claims, learning, scenes, trained_model
from reproduction.plots.style import STYLE, Plot, save
from reproduction.reproduce import default_jobs, execute, predictions
from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError

__all__ = ["main", "page", "summary"]

PAGE = checkout() / "docs" / "evidence.md"
TEMPLATE = checkout() / "reproduction" / "evidence_page.md"

# Label in the pictures -> the row, of which the run with seed 1 is shown.
_FOCAL, _BALANCED = "FL, γ = 2", "CE, α = .75, π = .01"
_SHOWN = {
    _FOCAL: "1b gamma=2",
    _BALANCED: "1a alpha=0.75",
    "CE, π = .01": "5.1 pi=0.01",
    "CE, π = .5": "5.1 pi=0.5",
}
_SCENES = (_BALANCED, _FOCAL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="seeds 1 to N of each row (default 2)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per GPU or core)")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"))
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="(default: docs/ledger.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: docs/evidence.md)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start none")
    args = parser.parse_args(argv)
    try:
        ledger = Ledger(args.ledger)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    output = args.output.resolve()
    runs = plan(select_rows(MINI_TABLES, []), "mini", args.seeds)
    folders = {
        label: output / "mini" / next(run.key for run in runs if row in run.rows)
        for label, row in _SHOWN.items()
    }
    incomplete = _incomplete(folders, ledger)
    todo = [r for r in runs if r.key not in ledger.runs("mini") or r.key in incomplete]
    jobs = args.jobs or default_jobs("mini")
    print(f"{len(todo)} runs to train, {jobs} at a time")
    if args.dry_run:
        print("\n".join(f"{run.key}  {', '.join(run.rows)}" for run in todo))
        return 0
    try:
        if execute(todo, "mini", jobs, output, ledger):
            return 1
        for run in runs:
            ledger.add_rows("mini", run.key, run.rows)
        with matplotlib.rc_context(STYLE):
            text = page(ledger, folders, args.page)
    except (ConfigError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    with atomic_write(args.page) as path:
        path.write_text(text, encoding="utf-8")
    print(f"evidence: {args.page}")
    return 0


def page(ledger: Ledger, folders: dict[str, Path], path: Path) -> str:
    """Draw the pictures beside ``path`` and return the page's text.

    Args:
        ledger: the results.
        folders: label -> ``OUTPUT_DIR`` of the runs in the pictures.
        path: of the page.
    """
    found = list(judged(ledger.claims, ledger.by_row("mini")))
    folder = folders[_FOCAL]
    found_by = {label: predictions(folders[label], MINI_DATASET) for label in _SCENES}
    drawn = {
        "claims": claims.draw(found),
        "loss": trained_model.draw(str(folder / "config.yaml"), str(folder / "model_final.pth")),
        "curves": learning.draw(folders),
        "scenes": scenes.draw(found_by, MINI_DATASET),
    }
    for name, plot in drawn.items():
        save(Plot(plot.figure, {}), path.parent / "images", f"evidence_{name}", ("png",))
    reasons = notes(found)
    verdicts = [[claim.text, *judgement.rows, judgement.verdict] for claim, judgement in found]
    return TEMPLATE.read_text(encoding="utf-8").format(
        summary=textwrap.fill(summary(found, len(ledger.claims)), 105),
        dataset=MINI_DATASET,
        table=_markdown(["the paper's claim", "better", "compared with", "shows?"], verdicts),
        reasons=f"\n{reasons}" if reasons else "",
        shares=_table(drawn["loss"], "shares", ("", "", "g", ".3f", ".3f")),
        thresholds=_table(drawn["scenes"], "", ".3f"),
    )


def summary(found: Sequence[tuple[Claim, Judgement]], total: int) -> str:
    """How many of the claims show.

    Args:
        found: those whose rows have results.
        total: number of all claims.
    """
    measured = f"{total} orderings that the paper reports"
    if len(found) < total:
        measured = f"{measured}, {len(found)} have been measured so far. Of these"
    clear = sum(j.holds and j.clear for _, j in found)
    unclear = sum(not j.clear for _, j in found)
    wrong = sum(not j.holds and j.clear for _, j in found)
    return (
        f"Of {measured}, {clear} show, {wrong} do not, and {unclear} are not clear: chance may "
        "explain them, or there is one seed only."
    )


def _incomplete(folders: dict[str, Path], ledger: Ledger) -> set[str]:
    """The keys of the runs that lack something that the pictures need."""
    found = set()
    for label, folder in folders.items():
        needed = [folder / "metrics.json"]
        # metrics.json is there from the first iterations on: the weights say that it is whole
        if "diverged_at" not in ledger.runs("mini").get(folder.name, {}):
            needed.append(folder / "model_final.pth")
        if label in _SCENES:
            needed.append(predictions(folder, MINI_DATASET))
        if not all(path.is_file() for path in needed):
            found.add(folder.name)
    return found


def _table(plot: Plot, name: str, floatfmt: str | Sequence[str]) -> str:
    header, rows = plot.tables[name]
    return _markdown(header, rows, floatfmt)


def _markdown(
    header: Sequence[str], rows: Iterable[Sequence[Any]], floatfmt: str | Sequence[str] = "g"
) -> str:
    return tabulate(rows, header, "github", floatfmt=floatfmt)


if __name__ == "__main__":
    sys.exit(main())
