"""The charts of a report, by plotly. A class that is chosen on the page replaces their numbers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from retina_plugin.optional import optional

from .result import Analysis
from .thresholds import GRID

__all__ = ["MOST_CLASSES", "class_data", "confused_classes", "figures"]

MOST_CLASSES = 40  # in a chart with an axis of classes
_MANY = 200  # classes, from which on their curves are thinned

# Okabe and Ito's colours, which the colour-blind tell apart: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a95a1"
_BLUES = [[0.0, "#ffffff"], [0.15, "#d3e5f3"], [0.5, "#5ea3d3"], [1.0, "#00426b"]]
_ERROR_NAMES = {
    "Cls": "wrong class",
    "Loc": "box is off",
    "Both": "wrong class, box is off",
    "Dupe": "second box",
    "Bkg": "on background",
    "Miss": "missed",
}


def figures(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """Name -> a figure for ``Plotly.newPlot``. Some are left out if there is nothing to show.

    Raises:
        ConfigError: plotly is not installed.
    """
    go = optional("plotly.graph_objects", "retina report")
    found = {
        "classes": _classes(go, analysis),
        "sizes": _sizes(go, analysis),
        "ious": _ious(go, analysis),
        "curve": _curve(go, analysis),
        "sweep": _sweep(go, analysis),
        "errors": _errors(go, analysis),
        "confusion": _confusion(go, analysis),
        "calibration": _calibration(go, analysis),
    }
    if analysis.comparison is not None:
        found["differences"] = _differences(go, analysis)
        found["class_differences"] = _class_differences(go, analysis)
    return {name: figure.to_plotly_json() for name, figure in found.items()}


def class_data(analysis: Analysis) -> list[dict[str, Any]]:
    """What the charts show if a class is chosen: a dict for each class. Curves are rounded."""
    curves = analysis.curves
    step = 2 if len(analysis.classes) > _MANY else 1
    return [
        {
            "sizes": [_rounded(c.metrics[name]) for name in ("APs", "APm", "APl")],
            "ious": _list(curves.class_ap_by_iou[k], 1),
            "curve": [_list(row[::step], 3) for row in curves.precision[k]],
            "sweep": [_list(row[::step], 3) for row in curves.class_sweep[k]],
            "threshold": float(analysis.thresholds[k]),
        }
        for k, c in enumerate(analysis.classes)
    ]


def confused_classes(analysis: Analysis) -> list[int]:
    """The classes that are most often taken for another or for background, at most MOST_CLASSES."""
    matrix = analysis.confusion.astype(np.int64)
    number = len(matrix) - 1
    mutual = matrix[:number, :number] - np.diag(np.diag(matrix)[:number])
    wrong = mutual.sum(axis=0) + mutual.sum(axis=1)
    background = matrix[:number, number] + matrix[number, :number]
    if number <= MOST_CLASSES:
        return list(range(number))
    order = np.lexsort((-background, -wrong))
    return sorted(order[:MOST_CLASSES].tolist())


def _classes(go: Any, analysis: Analysis) -> Any:
    known = [k for k, c in enumerate(analysis.classes) if c.metrics["AP"] is not None]
    order = sorted(known, key=lambda k: analysis.classes[k].metrics["AP"] or 0.0)[:MOST_CLASSES]
    rows = [analysis.classes[k] for k in order]
    texts = [
        f"{_name(c.name)}<br>AP {_number(c.metrics['AP'])}, AP50 {_number(c.metrics['AP50'])}"
        f"<br>{c.objects:,} objects in {c.images:,} images"
        for c in rows
    ]
    bar = go.Bar(
        x=list(range(len(rows))),
        y=[c.metrics["AP"] for c in rows],
        customdata=order,
        hovertext=texts,
        hoverinfo="text",
        marker_color=BLUE,
    )
    figure = go.Figure(bar, _layout(yaxis_title="AP", height=300))
    figure.update_xaxes(_ticks([c.name for c in rows]))
    figure.update_yaxes(range=[0, 100])
    return figure


def _sizes(go: Any, analysis: Analysis) -> Any:
    names = ["small<br>below 32² px", "medium<br>to 96² px", "large"]
    values = [analysis.metrics[name] for name in ("APs", "APm", "APl")]
    bar = go.Bar(
        x=names, y=values, marker_color=BLUE, width=0.5, hovertemplate="AP %{y:.1f}<extra></extra>"
    )
    figure = go.Figure(bar, _layout(yaxis_title="AP", height=280))
    figure.update_yaxes(range=[0, 100])
    return figure


def _ious(go: Any, analysis: Analysis) -> Any:
    line = go.Scatter(
        x=np.linspace(0.5, 0.95, 10).round(2).tolist(),
        y=_list(analysis.curves.ap_by_iou, 2),
        mode="lines+markers",
        line_color=BLUE,
        hovertemplate="IoU %{x}: AP %{y:.1f}<extra></extra>",
    )
    figure = go.Figure(line, _layout(yaxis_title="AP", xaxis_title="IoU", height=280))
    figure.update_yaxes(range=[0, 100])
    return figure


def _curve(go: Any, analysis: Analysis) -> Any:
    curves = analysis.curves
    figure = go.Figure(layout=_layout(xaxis_title="recall", yaxis_title="precision", height=340))
    for iou, row, colour, dash in zip(
        curves.ious, curves.mean_precision, (BLUE, ORANGE, RED), ("solid", "dash", "dot")
    ):
        figure.add_scatter(
            x=GRID.tolist(),
            y=_list(row, 3),
            name=f"IoU {iou}",
            line={"color": colour, "dash": dash},
            hovertemplate=f"IoU {iou}: precision %{{y:.2f}} at recall %{{x:.2f}}<extra></extra>",
        )
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _sweep(go: Any, analysis: Analysis) -> Any:
    figure = go.Figure(layout=_layout(xaxis_title="score threshold", height=340))
    for name, row, colour, dash in zip(
        ("precision", "recall", "F1"),
        analysis.curves.sweep,
        (ORANGE, GREEN, BLUE),
        ("dash", "dot", "solid"),
    ):
        figure.add_scatter(
            x=GRID.tolist(),
            y=_list(row, 3),
            name=name,
            line={"color": colour, "dash": dash},
            hovertemplate=f"{name} %{{y:.2f}} from score %{{x:.2f}} on<extra></extra>",
        )
    best = analysis.overall.score if analysis.chosen is None else analysis.chosen
    if best is not None:
        figure.add_vline(x=best, line_color=GREY, line_width=1)
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _errors(go: Any, analysis: Analysis) -> Any:
    errors = analysis.errors[::-1]
    bar = go.Bar(
        y=[_ERROR_NAMES[error.name] for error in errors],
        x=[error.cost for error in errors],
        customdata=[error.count for error in errors],
        orientation="h",
        marker_color=RED,
        hovertemplate="%{x:.2f} points of AP50, %{customdata:,} errors<extra></extra>",
    )
    figure = go.Figure(bar, _layout(xaxis_title="points of AP50 that it costs", height=280))
    figure.update_layout(margin_l=150)
    return figure


def _confusion(go: Any, analysis: Analysis) -> Any:
    places = confused_classes(analysis)
    background = len(analysis.confusion) - 1
    matrix = analysis.confusion[np.ix_([*places, background], [*places, background])].astype(float)
    rows = np.maximum(analysis.confusion[[*places, background]].sum(axis=1, keepdims=True), 1)
    share = 100 * matrix / rows
    share[-1] = np.nan  # of the background there is no number of objects
    names = [*(analysis.truth.class_names[k] for k in places), "background"]
    texts = [
        [
            f"{_name(row)} → {_name(column)}<br>{int(matrix[i, j]):,}"
            + ("" if i == len(names) - 1 else f", {share[i, j]:.1f} % of these objects")
            for j, column in enumerate(names)
        ]
        for i, row in enumerate(names)
    ]
    few = len(names) <= 15
    counts = [[f"{int(x):,}" if x else "" for x in row] for row in matrix]
    heat = go.Heatmap(
        z=[_list(row, 2) for row in share],
        hovertext=texts,
        hoverinfo="text",
        colorscale=_BLUES,
        zmin=0,
        zmax=100,
        xgap=1,
        ygap=1,
        hoverongaps=True,
        colorbar={"title": {"text": "% of<br>objects"}, "thickness": 12},
        **({"text": counts, "texttemplate": "%{text}"} if few else {}),
    )
    side = min(640, 200 + 32 * len(names)) if few else 680
    figure = go.Figure(heat, _layout(xaxis_title="taken for", yaxis_title="object", height=side))
    figure.update_xaxes(_ticks(names), showgrid=False)
    figure.update_yaxes(_ticks(names), autorange="reversed", showgrid=False)
    return figure


def _calibration(go: Any, analysis: Analysis) -> Any:
    bins = [b for b in analysis.calibration["bins"] if b["count"]]
    figure = go.Figure(
        layout=_layout(xaxis_title="mean score", yaxis_title="share that is right", height=340)
    )
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        name="perfect",
        mode="lines",
        line={"color": GREY, "dash": "dash", "width": 1},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[b["avg_confidence"] for b in bins],
        y=[b["avg_accuracy"] for b in bins],
        customdata=[b["count"] for b in bins],
        name="this model",
        mode="lines+markers",
        line_color=BLUE,
        hovertemplate="score %{x:.2f}: %{y:.0%} are right, of %{customdata:,}<extra></extra>",
    )
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _differences(go: Any, analysis: Analysis) -> Any:
    assert analysis.comparison is not None
    metrics = analysis.comparison.metrics
    rows = [(name, m) for name, m in metrics.items() if m["lower"] is not None]
    value = [m["difference"] for _, m in rows]
    up = [m["upper"] - m["difference"] for _, m in rows]  # type: ignore[operator]
    down = [m["difference"] - m["lower"] for _, m in rows]  # type: ignore[operator]
    dots = go.Scatter(
        x=[name for name, _ in rows],
        y=value,
        error_y={"type": "data", "array": up, "arrayminus": down, "color": BLUE},
        mode="markers",
        marker={"color": BLUE, "size": 9},
        customdata=[[m["lower"], m["upper"]] for _, m in rows],
        hovertemplate="%{x}: %{y:+.1f}, 95 % interval %{customdata[0]:+.1f} to "
        "%{customdata[1]:+.1f}<extra></extra>",
    )
    figure = go.Figure(dots, _layout(yaxis_title="difference", height=300))
    figure.add_hline(y=0, line_color=GREY, line_width=1)
    return figure


def _class_differences(go: Any, analysis: Analysis) -> Any:
    assert analysis.comparison is not None
    change = analysis.comparison.classes
    known = np.flatnonzero(~np.isnan(change))
    order = known[np.argsort(-np.abs(change[known]), kind="stable")][:MOST_CLASSES]
    order = order[np.argsort(change[order], kind="stable")]
    names = [analysis.truth.class_names[k] for k in order]
    bar = go.Bar(
        x=list(range(len(order))),
        y=change[order].tolist(),
        marker_color=[GREEN if x > 0 else RED for x in change[order]],
        hovertext=[f"{_name(name)}: {x:+.1f}" for name, x in zip(names, change[order])],
        hoverinfo="text",
    )
    figure = go.Figure(bar, _layout(yaxis_title="difference of AP", height=300))
    figure.update_xaxes(_ticks(names))
    return figure


def _layout(**more: Any) -> dict[str, Any]:
    """What all charts have in common."""
    axis = {"gridcolor": "#e3e8ed", "zeroline": False, "automargin": True, "fixedrange": False}
    return {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1d232b"},
        "margin": {"l": 55, "r": 15, "t": 15, "b": 45},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.08},
        "hoverlabel": {"align": "left"},
        "template": None,
        "xaxis": {**axis, "title": {"text": more.pop("xaxis_title", "")}},
        "yaxis": {**axis, "title": {"text": more.pop("yaxis_title", "")}},
        **more,
    }


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    """Places 0, 1, ... with names; a name as a place would be sorted, or taken for a number."""
    short = [_name(n if len(n) <= 18 else f"{n[:17]}…") for n in names]
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": short}


def _name(name: str) -> str:
    """plotly reads a part of HTML in its texts."""
    return html.escape(name, quote=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _list(values: np.ndarray, digits: int) -> list[float | None]:
    return [_rounded(x, digits) for x in values.tolist()]
