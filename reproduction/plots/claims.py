"""The paper's orderings: its difference of AP, and the one measured here with its interval."""

from __future__ import annotations

from collections.abc import Sequence

from reproduction.claims import Judgement, paper_difference
from reproduction.paper import Claim

from .style import BLACK, BLUE, GREY, ORANGE, Plot, new_figure

__all__ = ["draw"]


def draw(found: Sequence[tuple[Claim, Judgement]]) -> Plot:
    """A line for each claim about AP whose rows did not diverge, in the order of the paper."""
    shown = [(claim, judgement) for claim, judgement in found if judgement.interval]
    figure, (axes,) = new_figure(9.6, 0.9 + 0.42 * len(shown))
    for place, (claim, judgement) in enumerate(shown):
        assert judgement.interval is not None
        difference, low, high = judgement.interval
        paper = paper_difference(claim)
        colour = (BLUE if judgement.holds else ORANGE) if judgement.clear else GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(difference, place, "o", color=colour, markersize=7)
        if paper is not None:
            axes.plot(paper, place, "D", color=BLACK, markersize=5, fillstyle="none")
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.plot([], [], "D", color=BLACK, fillstyle="none", label="paper")
    for label, colour in {"shows": BLUE, "not clear": GREY, "does not show": ORANGE}.items():
        axes.plot([], [], "o-", color=colour, label=f"here, {label}")
    axes.set_yticks(range(len(shown)), [claim.text.partition(" (")[0] for claim, _ in shown])
    axes.invert_yaxis()
    axes.set(xlabel="difference of AP, with its 95 % interval")
    axes.legend(loc="best")
    return Plot(figure, {})
