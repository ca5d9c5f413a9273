"""What a benchmark leaves behind: a table, a JSON file and pictures."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.case import PEERS, Result
from reproduction.paper import load_paper

__all__ = ["draw", "draw_figure2", "read_results", "table", "write_results"]


def table(results: Iterable[Result]) -> str:
    """One line for each implementation."""
    rows, last = [], None
    for r in results:
        title = f"{r.stage}: {r.case}" if r.case != last else ""
        last = r.case
        spread = f"{r.ratio:.2f}x ({r.ratio_low:.2f} to {r.ratio_high:.2f})" if r.ratio else ""
        memory = "" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f} MB"
        rows.append([title, r.implementation, f"{r.milliseconds:.1f}", spread, memory])
    headers = ["case", "implementation", "ms", "times as fast", "peak memory"]
    return tabulate(rows, headers, disable_numparse=True)


def write_results(path: Path, machine: dict[str, Any], results: Iterable[Result]) -> None:
    contents = {"machine": machine, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(contents, indent=1))


def read_results(path: Path, machine: dict[str, Any]) -> list[Result]:
    """The results in a file, or none if it is of another machine or other versions."""
    if not path.is_file():
        return []
    contents = json.loads(path.read_text())
    return [Result(**r) for r in contents["results"]] if contents["machine"] == machine else []


def draw(results: Iterable[Result], title: str, path: Path) -> None:
    """A bar for each implementation but the first of a case: its ratio, on a logarithmic axis."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps state

    shown = [r for r in results if r.ratio is not None and r.implementation != "limit"]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r.stage}, {r.case}: {r.implementation}" for r in shown]
    colors = ["tab:gray" if r.implementation.startswith(PEERS) else "tab:blue" for r in shown]
    axes.barh(range(len(shown)), [r.ratio or 0 for r in shown], color=colors, left=0)
    for y, r in enumerate(shown):
        axes.text(r.ratio or 0, y, f" {r.ratio:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=1.6 * max(r.ratio or 0 for r in shown))  # room for the number
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as Detectron2 (median of the rounds)")
    figure.suptitle(textwrap.fill(title, 110), fontsize=9)
    figure.savefig(path, dpi=120)


def draw_figure2(results: Iterable[Result], machine_name: str, path: Path) -> None:
    """Figure 2's axes: the paper's AP over the time of an image, the paper's and measured."""
    from matplotlib.figure import Figure

    measured = {r.case: r.wall_milliseconds for r in results if r.stage == "inference"}
    rows = [row for row in load_paper()["1e"].rows if row.name in measured]
    if not rows:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for depth, marker, offset in (("R50", "o", (4, -10)), ("R101", "s", (-22, 4))):
        of_depth = [row for row in rows if row.name.startswith(depth)]
        ap = [row.metrics["AP"] for row in of_depth]
        paper = [row.metrics["ms"] for row in of_depth]
        here = [measured[row.name] for row in of_depth]
        axes.plot(paper, ap, marker=marker, color="tab:gray", label=f"{depth}, the paper's M40")
        axes.plot(here, ap, marker=marker, color="tab:blue", label=f"{depth}, {machine_name}")
        for x, y, row in zip(here, ap, of_depth):
            axes.annotate(
                row.name.split("-")[1],
                (x, y),
                fontsize=8,
                xytext=offset,
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.set_xlabel("ms an image")
    axes.set_ylabel("AP that the paper reports")
    axes.set_title("Speed side of Figure 2: times are measured, AP is the paper's", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
