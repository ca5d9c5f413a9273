"""How the figures look, and how they are written: the same input gives the same files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError, first_line

__all__ = [
    "BLACK",
    "BLUE",
    "BY_GAMMA",
    "GREEN",
    "GREY",
    "ORANGE",
    "PINK",
    "STYLE",
    "Plot",
    "new_figure",
    "save",
    "table_of",
]

# Colours that colour-blind readers tell apart (Okabe and Ito, https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
BLACK, GREY = "#000000", "#8C8C8C"
# Of the curves for rising gamma: CE is the blue top curve, as in the paper's Figure 1.
BY_GAMMA = (BLUE, ORANGE, YELLOW, PINK, GREEN)

# Legible where a page shows them 800 pixels wide.
STYLE: Any = {
    "axes.grid": True,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.dpi": 150,
    "font.size": 11,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "retina_plugin",  # ids in the file: otherwise random
}

Table = tuple[Sequence[str], Iterable[Sequence[Any]]]  # header, rows


@dataclass
class Plot:
    """A figure and the numbers in it.

    Args:
        figure: what is drawn.
        tables: end of a file's name -> its table: "" is ``NAME.csv``, "settings"
            ``NAME_settings.csv``.
        text: what is printed below the files' names.
    """

    figure: Figure
    tables: Mapping[str, Table]
    text: str = ""


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def table_of(columns: Mapping[str, Tensor]) -> Table:
    """A table with a header, of columns of the same length."""
    return tuple(columns), zip(*(column.tolist() for column in columns.values()))


def save(
    plot: Plot, folder: Path, name: str, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write ``name.png``, ``name.svg`` and the tables; returns their paths.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    pictures = {
        # matplotlib would add its version and, to an SVG, the time
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    written = []
    try:
        for suffix in formats:
            written.append(folder / f"{name}.{suffix}")
            with atomic_write(written[-1]) as path:
                plot.figure.savefig(path, metadata=pictures[suffix])
        for end, (header, rows) in plot.tables.items():
            written.append(folder / f"{name}{end and '_'}{end}.csv")
            with atomic_write(written[-1]) as path:
                path.write_text(_csv(header, rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {first_line(error)}") from None
    return written


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{x:.10g}" if isinstance(x, float) else x for x in row])
    return text.getvalue()
