"""Figure 2 and Table 1e: speed against AP."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from reproduction.paper import Row, load_figures, load_paper
from retina_plugin.errors import ConfigError, first_line, one_line

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, Plot, new_figure

__all__ = ["Point", "by_image_size", "read_points", "speed_and_accuracy"]

_MOST_POINTS = 100


class Point(NamedTuple):
    """A detector: AP in percent, and the time of an image in milliseconds."""

    name: str
    ms: float
    AP: float


def speed_and_accuracy(points_file: Path | None = None) -> Plot:
    """Figure 2: the paper's detectors, and the user's own.

    Raises:
        ConfigError: see :func:`read_points`.
    """
    own = [] if points_file is None else read_points(points_file)
    figure, (axes,) = new_figure(8.2, 5.4)
    rows: list[Sequence[Any]] = []
    models = load_paper()["1e"].rows
    for depth, colour, marker in ((50, BLUE, "o"), (101, ORANGE, "D")):
        of_depth = _of_depth(models, depth)
        points = [Point(row.name, row.metrics["ms"], row.metrics["AP"]) for row in of_depth]
        rows += [("RetinaNet, Table 1e", *point) for point in points]
        label = f"RetinaNet, ResNet-{depth}-FPN"
        axes.plot(
            *zip(*((p.ms, p.AP) for p in points)),
            color=colour,
            marker=marker,
            label=label,
            zorder=3,
        )
        for row, point in zip(of_depth, points):
            # Outside of both curves, which cross at the small sizes.
            inside = _size(row) > 500 if depth == 50 else _size(row) < 500
            outer = (-30, 3) if depth == 50 else (-4, 8)
            offset = outer if not inside else (9, -12 if depth == 50 else -4)
            _annotate(axes, point, str(_size(row)), offset, colour)
    others = [Point(**fields) for fields in load_figures()["2"]["others"]]
    rows += [("other, Figure 2", *point) for point in others]
    axes.plot(
        *zip(*((p.ms, p.AP) for p in others)),
        "s",
        color=GREY,
        label="other detectors of the paper",
    )
    for point in others:
        _annotate(axes, point, point.name, (7, -4), "#595959")
    if own:
        rows += [("yours", *point) for point in own]
        axes.plot(
            *zip(*((p.ms, p.AP) for p in own)), "*", color=BLACK, markersize=12, label="yours"
        )
        for point in own:
            _annotate(axes, point, point.name.replace("$", r"\$"), (8, 4), BLACK)
    note = "; yours: as you measured them" if own else ""
    axes.set(
        xlabel=f"time an image (ms; the paper's on an Nvidia M40{note})",
        ylabel="AP (%)",
        title="Speed and accuracy, COCO test-dev; numbers at the curves: image size in pixels",
    )
    axes.margins(x=0.12, y=0.1)
    axes.legend(loc="best" if own else "lower right")
    return Plot(figure, {"": (("source", "name", "ms", "AP"), rows)})


def by_image_size() -> Plot:
    """Table 1e: AP, AP by the size of the objects, and time, over the size of the images."""
    figure, (accuracy, time) = new_figure(9.6, 4.6, columns=2)
    curves = [("APl", "large objects", PINK), ("AP", "all objects", BLACK)]
    curves += [("APm", "medium", GREEN), ("APs", "small", ORANGE)]
    models = load_paper()["1e"].rows
    for depth, line, marker in ((50, "--", "o"), (101, "-", "D")):
        rows = _of_depth(models, depth)
        sizes = [_size(row) for row in rows]
        for metric, name, colour in curves:
            values = [row.metrics[metric] for row in rows]
            accuracy.plot(sizes, values, line, marker=marker, color=colour, markersize=5)
            if depth == 101:
                _annotate(accuracy, Point(name, sizes[-1], values[-1]), name, (8, -4), colour)
        values = [row.metrics["ms"] for row in rows]
        label = f"ResNet-{depth}-FPN"
        time.plot(sizes, values, line, marker=marker, color=BLUE, label=label)
        accuracy.plot([], [], line, marker=marker, color=GREY, label=label, markersize=5)
    size = "image size, shorter side (pixels)"
    accuracy.set(xlabel=size, ylabel="AP (%), COCO test-dev", ylim=(0, None), xlim=(None, 920))
    time.set(xlabel=size, ylabel="time an image (ms), Nvidia M40", ylim=(0, None))
    for axes in (accuracy, time):
        axes.set_xticks(sizes)
        axes.legend()
    figure.suptitle("RetinaNet by image size (Table 1e of the paper)", fontsize=12)
    table = [[row.name, *row.metrics.values()] for row in models]
    return Plot(figure, {"": (["model", *models[0].metrics], table)})


def read_points(path: Path) -> list[Point]:
    """A user's models: a CSV with the columns name, ms and AP, or a JSON list of such objects.

    Raises:
        ConfigError: there is no such file, it is neither, or an entry is not a model's.
    """
    read = {".csv": _read_csv, ".json": _read_json}.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"--points {path}: give a .csv or .json file")
    try:
        entries = read(path)
    except OSError as error:
        raise ConfigError(f"--points {path}: {error.strerror or first_line(error)}") from None
    except (ValueError, RecursionError, csv.Error) as error:  # of json and of UTF-8
        raise ConfigError(f"--points {path}: {first_line(error)}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"--points {path} has no entries: it needs name, ms and AP of each model")
    if len(entries) > _MOST_POINTS:
        raise ConfigError(f"--points {path} has {len(entries)} entries: at most {_MOST_POINTS}")
    return [_own_point(entry, f"--points {path}, entry {i}") for i, entry in enumerate(entries, 1)]


def _read_csv(path: Path) -> Any:
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
        return list(csv.DictReader(file, skipinitialspace=True))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _own_point(entry: Any, where: str) -> Point:
    if not isinstance(entry, Mapping) or not {"name", "ms", "AP"} <= entry.keys():
        raise ConfigError(f"{where}: it needs name, ms and AP")
    ms, AP = (_number(entry[key]) for key in ("ms", "AP"))
    if not 0 < ms < math.inf:  # also for NaN
        raise ConfigError(f"{where}: ms is {entry['ms']!r:.50}: give the milliseconds an image")
    if not 0 <= AP <= 100:
        raise ConfigError(f"{where}: AP is {entry['AP']!r:.50}: give percent, from 0 to 100")
    return Point(one_line(str(entry["name"]))[:60], ms, AP)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _of_depth(models: Sequence[Row], depth: int) -> list[Row]:
    return [row for row in models if row.settings["MODEL.RESNETS.DEPTH"] == depth]


def _size(row: Row) -> int:
    return row.settings["INPUT.MIN_SIZE_TEST"]


def _annotate(
    axes: Axes, point: Point, text: str, offset: tuple[float, float], colour: str
) -> None:
    axes.annotate(
        text, (point.ms, point.AP), offset, textcoords="offset points", color=colour, fontsize=10
    )
