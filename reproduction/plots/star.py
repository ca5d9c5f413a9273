"""Figure 7: FL* by gamma and beta, and which settings train a good model.

The paper's figure shows many settings, but only the AP of the two in Table 3 is published. Beside
them stands what a ledger has. docs/reproduction.md says how to try other settings.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from tabulate import tabulate

from reproduction.ledger import Ledger
from reproduction.paper import load_figures, load_paper
from reproduction.plan import is_current
from retina_plugin.errors import ConfigError
from retina_plugin.losses import FocalLossStar

from .curves import loss_axis, table3_loss
from .style import BLACK, BLUE, GREY, ORANGE, Plot, new_figure, table_of

__all__ = ["Setting", "Source", "of_ledger", "of_paper", "settings"]

# For the shape of the loss only: curves of settings that nobody trained. Ours, not the paper's.
_GRID = tuple(itertools.product((1, 2, 3, 4, 5), (0, 1, 2)))

_GAMMA, _BETA = "MODEL.RETINANET.FOCAL_STAR_GAMMA", "MODEL.RETINANET.FOCAL_STAR_BETA"
_LOSS_KEYS = ("SEED", "MODEL.RETINANET.CLS_LOSS", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", _GAMMA, _BETA)


@dataclass(frozen=True)
class Setting:
    """FL* with a gamma and beta, and the AP (percent) of each model trained with it.

    A training that diverged has AP 0.
    """

    gamma: float
    beta: float
    APs: tuple[float, ...]

    @property
    def AP(self) -> float:
        return statistics.mean(self.APs)


@dataclass(frozen=True)
class Source:
    """Settings that were trained alike.

    Args:
        name: where they come from.
        settings: in the order of gamma and beta.
        threshold: a setting is effective if its AP is higher.
        rule: what the threshold is, in words.
    """

    name: str
    settings: tuple[Setting, ...]
    threshold: float
    rule: str

    def is_effective(self, setting: Setting) -> bool:
        return setting.AP > self.threshold


def of_paper() -> Source:
    """The settings of Table 3."""
    found = []
    for row in load_paper()["3"].rows:
        loss = table3_loss(row)
        if isinstance(loss, FocalLossStar):
            found.append(Setting(loss.gamma, loss.beta, (row.metrics["AP"],)))
    threshold = load_figures()["7"]["effective_above"]
    return Source("the paper, COCO minival", _ordered(found), threshold, f"AP > {threshold:g}")


def of_ledger(ledger: Ledger, scale: str) -> Source | None:
    """The settings of FL* in a ledger at one scale, or None if it has none.

    Effective is what comes as near to FL with gamma 2 as in the paper, whose FL has 34.0 and whose
    threshold is 33.5. Runs count that differ from an FL run in the loss alone.
    """
    table = load_paper()["3"]
    reference = {str(row): row for row in table.rows}
    by_protocol: dict[Any, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, result in ledger.runs(scale).items():
        opts = dict(zip(result["opts"][::2], result["opts"][1::2]))
        protocol = frozenset((k, v) for k, v in opts.items() if k not in _LOSS_KEYS)
        for row in (reference[name] for name in result["rows"] if name in reference):
            if not is_current(key, str(row), scale, result.get("set", ())):
                continue  # its configs were changed since
            AP = result.get("AP", 0.0)
            if row.name == "FL":
                by_protocol[protocol]["FL"].append(AP)
            elif _GAMMA in row.settings:
                setting = tuple(float(opts.get(k, row.settings[k])) for k in (_GAMMA, _BETA))
                by_protocol[protocol][setting].append(AP)
    complete = [found for found in by_protocol.values() if "FL" in found and len(found) > 1]
    if not complete:
        return None
    found = max(complete, key=len)
    FL = statistics.mean(found.pop("FL"))
    (paper_FL,) = (row.metrics["AP"] for row in table.rows if row.name == "FL")
    gap = paper_FL - load_figures()["7"]["effective_above"]
    stars = [Setting(gamma, beta, tuple(APs)) for (gamma, beta), APs in found.items()]
    rule = f"AP > {FL - gap:.1f}, FL's {FL:.1f} less {gap:g}"
    return Source(f"the ledger, {scale} scale", _ordered(stars), FL - gap, rule)


def settings(ledger_file: Path) -> Plot:
    """Figure 7: the paper's settings, and beside them those of each scale of a ledger.

    Raises:
        ConfigError: the ledger cannot be read.
    """
    if not ledger_file.is_file():
        raise ConfigError(f"--ledger: no file {ledger_file}")
    ledger = Ledger(ledger_file, claims=())
    measured = [of_ledger(ledger, scale) for scale in ("paper", "mini")]
    sources = [of_paper(), *(source for source in measured if source is not None)]
    x_t = loss_axis()
    trained = [(s.gamma, s.beta) for source in sources for s in source.settings]
    columns = {"x_t": x_t}
    for gamma, beta in sorted({*_GRID, *trained}):
        loss = FocalLossStar(gamma=gamma, beta=beta)
        columns[f"FL* gamma={gamma:g} beta={beta:g}"] = loss.value(x_t)
    figure, panels = new_figure(max(6.8, 5.0 * len(sources)), 4.6, columns=len(sources))
    for axes, source in zip(panels, sources):
        _panel(axes, source)
    header = ["source", "gamma", "beta", "AP", "models", "spread", "effective", "rule"]
    rows = [
        [
            source.name,
            s.gamma,
            s.beta,
            s.AP,
            len(s.APs),
            max(s.APs) - min(s.APs),
            "yes" if source.is_effective(s) else "no",
            source.rule,
        ]
        for source in sources
        for s in source.settings
    ]
    text = tabulate(rows, header, "pipe", floatfmt=("", "g", "g", ".1f", "", ".1f"))
    return Plot(figure, {"": table_of(columns), "settings": (header, rows)}, text)


def _panel(axes: Axes, source: Source) -> None:
    x_t = loss_axis()
    trained = {(s.gamma, s.beta) for s in source.settings}
    label: str | None = "not trained"
    for gamma, beta in _GRID:
        if (gamma, beta) not in trained:
            loss = FocalLossStar(gamma=gamma, beta=beta).value(x_t)
            axes.plot(x_t, loss, color=GREY, linewidth=0.7, alpha=0.6, label=label)
            label = None
    lines = {
        True: itertools.cycle(("-", "--", ":", "-.")),
        False: itertools.cycle(("--", ":", "-.", "-")),
    }
    for setting in source.settings:
        effective = source.is_effective(setting)
        axes.plot(
            x_t,
            FocalLossStar(gamma=setting.gamma, beta=setting.beta).value(x_t),
            next(lines[effective]),
            color=BLUE if effective else ORANGE,
            label=f"γ = {setting.gamma:g}, β = {setting.beta:g}: AP {setting.AP:.1f}",
        )
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set(
        xlabel="$x_t = y\\,x$",
        ylabel="FL* (nats)",
        xlim=(-5, 5),
        ylim=(0, 6),
        title=f"{source.name[0].upper()}{source.name[1:]}\nblue: {source.rule}",
    )
    axes.legend()


def _ordered(found: Sequence[Setting]) -> tuple[Setting, ...]:
    return tuple(sorted(found, key=lambda s: (s.gamma, s.beta)))
