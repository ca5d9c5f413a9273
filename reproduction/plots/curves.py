"""Figures 1, 5 and 6: losses and their derivatives, by the package's own functions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from reproduction.paper import Row, load_figures, load_paper
from retina_plugin.losses import ClassificationLoss, CrossEntropy, FocalLoss, FocalLossStar

from .style import BLACK, BLUE, BY_GAMMA, GREEN, ORANGE, Plot, new_figure, table_of

__all__ = ["derivatives", "focal_by_gamma", "loss_axis", "table3_loss", "variants"]

_NUM_POINTS = 1001


def loss_axis() -> Tensor:
    """x_t from -5 to 5, in float64: where Figures 5 to 7 show the losses."""
    return torch.linspace(-5, 5, _NUM_POINTS, dtype=torch.float64)


def focal_by_gamma() -> Plot:
    """Figure 1: FL over p_t, for the paper's values of gamma."""
    p_t = torch.linspace(0, 1, _NUM_POINTS, dtype=torch.float64)[1:]  # the loss is infinite at 0
    x_t = p_t.logit()
    columns = {"p_t": p_t}
    figure, (axes,) = new_figure(6.8, 4.4)
    for gamma, colour in zip(load_figures()["1"]["gamma"], BY_GAMMA):
        loss = FocalLoss(gamma=gamma).value(x_t)
        columns[f"FL gamma={gamma:g}"] = loss
        label = f"γ = {gamma:g}" + (" (CE)" if gamma == 0 else "")
        axes.plot(p_t, loss, color=colour, label=label)
    axes.axvspan(0.5, 1, color=GREEN, alpha=0.07, linewidth=0)
    axes.text(0.75, 1.6, "well-classified\nexamples", ha="center", color="#00664B")
    axes.set(
        xlabel="$p_t$, probability of the true class",
        ylabel="loss (nats)",
        xlim=(0, 1),
        ylim=(0, 5),
        title="Focal loss, $FL(p_t) = -(1 - p_t)^γ\\,\\log(p_t)$",
    )
    axes.legend()
    return Plot(figure, {"": table_of(columns)})


def variants() -> Plot:
    """Figure 5: CE, FL and FL* over x_t, with the settings of Table 3."""
    return _over_x_t("value", "loss (nats)", "CE, FL and FL* (Appendix A)")


def derivatives() -> Plot:
    """Figure 6: the derivatives of the losses of Figure 5 with respect to x_t."""
    title = "Derivatives of CE, FL and FL* (Appendix B)"
    return _over_x_t("derivative", "derivative by $x_t$ (nats per logit)", title)


def _over_x_t(what: str, label: str, title: str) -> Plot:
    x_t = loss_axis()
    columns = {"x_t": x_t}
    figure, (axes,) = new_figure(6.8, 4.4)
    styles = zip((BLACK, BLUE, ORANGE, GREEN), itertools.cycle(("-", "-", "--", "-.")))
    for row, (colour, line) in zip(load_paper()["3"].rows, styles):
        loss = table3_loss(row)
        y = getattr(loss, what)(x_t)
        name = _name(loss)
        columns[name.replace("γ", "gamma").replace("β", "beta").replace(" = ", "=")] = y
        axes.plot(x_t, y, line, color=colour, label=name)
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set(
        xlabel="$x_t = y\\,x$, the logit times the label (well classified: above 0)",
        ylabel=label,
        xlim=(-5, 5),
        title=title,
    )
    axes.legend()
    return Plot(figure, {"": table_of(columns)})


def table3_loss(row: Row) -> ClassificationLoss:
    """The loss of a row of Table 3. The figures show its value without alpha."""
    key = "MODEL.RETINANET."
    if row.settings[key + "CLS_LOSS"] == "FocalLossStar":
        gamma, beta = (row.settings[f"{key}FOCAL_STAR_{name}"] for name in ("GAMMA", "BETA"))
        return FocalLossStar(gamma=gamma, beta=beta)
    if row.settings[key + "CLS_LOSS"] == "FocalLoss":
        return FocalLoss(gamma=row.settings[key + "FOCAL_LOSS_GAMMA"])
    return CrossEntropy()


def _name(loss: ClassificationLoss) -> str:
    if isinstance(loss, FocalLossStar):
        return f"FL* γ = {loss.gamma:g}, β = {loss.beta:g}"
    return f"FL γ = {loss.gamma:g}" if isinstance(loss, FocalLoss) else "CE"
