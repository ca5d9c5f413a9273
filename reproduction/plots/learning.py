"""Learning curves: the classification loss of runs over their iterations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retina_plugin.engine.report import read_metrics

from .style import BY_GAMMA, Plot, new_figure

__all__ = ["draw"]


def draw(folders: Mapping[str, Path]) -> Plot:
    """The loss of each run as logged, on a logarithmic axis.

    Args:
        folders: label -> ``OUTPUT_DIR`` of a run.
    """
    figure, (axes,) = new_figure(7.6, 4.4)
    for (label, folder), colour in zip(folders.items(), BY_GAMMA):
        points = np.array(read_metrics(folder / "metrics.json")["loss_cls"])
        axes.plot(points[:, 0] + 1, points[:, 1], color=colour, label=label)
    axes.set(xlabel="iteration", ylabel="classification loss (nats)", yscale="log")
    axes.legend()
    return Plot(figure, {})
