"""Write ``docs/evidence.md``: which of the paper's claims show at the mini scale, with pictures.

    python -m reproduction.evidence

Trains what the ledger and the pictures need and what is not there yet: with the repository's ledger
the four runs of the pictures, without it all (some hours). Everything is drawn from the ledger and
from the folders of those runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

from reproduction.claims import Judgement, judged
from reproduction.ledger import LEDGER, Ledger
from reproduction.paper import Claim, checkout
from reproduction.plan import Run, plan, select_rows
from reproduction.plots import claims, learning, scenes, trained_model
from reproduction.plots.style import STYLE, Plot, save
from reproduction.reproduce import default_jobs, execute
from retina_plugin.cache import atomic_write
from retina_plugin.engine import check_weights, setup_cfg
from retina_plugin.errors import ConfigError

__all__ = ["MINI_TABLES", "main", "page"]

PAGE = checkout() / "docs" / "evidence.md"
TEMPLATE = checkout() / "reproduction" / "evidence_page.md"
MINI_TABLES = ("5.1", "1a", "1b", "1c", "1d", "3")  # of rows that the mini scale has

_DATASET = "digits_sparse_val"
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
    ledger, output = Ledger(args.ledger), args.output.resolve()
    shown = {label: _run_of(row) for label, row in _SHOWN.items()}
    for run in shown.values():
        run.folder = output / "mini" / run.key
    todo = {
        run.key: run
        for run in plan(select_rows(MINI_TABLES, []), "mini", args.seeds)
        if run.key not in ledger.runs("mini")
    }
    todo |= {run.key: run for run in shown.values() if not _has_files(run.folder)}
    jobs = min(args.jobs or default_jobs("mini"), max(1, len(todo)))
    print(f"{len(todo)} runs to train, {jobs} at a time")
    if args.dry_run:
        print("\n".join(f"{run.key}  {', '.join(run.rows)}" for run in todo.values()))
        return 0
    try:
        if todo:
            first = next(iter(todo.values()))
            check_weights(setup_cfg(str(first.config), first.opts))
            if execute(list(todo.values()), "mini", jobs, output, ledger):
                return 1
        with matplotlib.rc_context(STYLE):
            text = page(ledger, {label: run.folder for label, run in shown.items()}, args.page)
    except ConfigError as error:
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
    loss = trained_model.draw(str(folder / "config.yaml"), str(folder / "model_final.pth"))
    predictions = {label: _predictions(folders[label]) for label in _SCENES}
    drawn = {
        "claims": claims.draw(found),
        "loss": loss,
        "curves": learning.draw(folders),
        "scenes": scenes.draw(predictions, _DATASET),
    }
    for name, plot in drawn.items():
        save(Plot(plot.figure, {}), path.parent / "images", f"evidence_{name}", ("png",))
    verdicts = [[claim.text, *judgement.rows, judgement.verdict] for claim, judgement in found]
    return TEMPLATE.read_text(encoding="utf-8").format(
        summary=summary(found),
        dataset=_DATASET,
        table=_markdown(["the paper's claim", "better", "compared with", "shows?"], verdicts),
        shares=_table(drawn["loss"], "shares"),
        thresholds=_table(drawn["scenes"], ""),
    )


def summary(found: Sequence[tuple[Claim, Judgement]]) -> str:
    """How many of the claims show, and how many clearly."""
    clear = sum(j.holds and j.clear for _, j in found)
    unclear = sum(not j.clear for _, j in found)
    wrong = sum(not j.holds and j.clear for _, j in found)
    return (
        f"Of {len(found)} orderings that the paper reports, {clear} show, {unclear} lie within "
        f"their 95 % interval, and {wrong} do not show."
    )


def _run_of(row: str) -> Run:
    table, _, name = row.partition(" ")
    (run,) = plan(select_rows([table], [name]), "mini", 1)
    return run


def _has_files(folder: Path) -> bool:
    return (folder / "model_final.pth").is_file() and _predictions(folder).is_file()


def _predictions(folder: Path) -> Path:
    return folder / "inference" / _DATASET / "coco_instances_results.json"


def _table(plot: Plot, name: str) -> str:
    header, rows = plot.tables[name]
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return tabulate(rows, header, "github", floatfmt=".3f")


if __name__ == "__main__":
    sys.exit(main())
