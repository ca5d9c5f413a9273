"""Whether what was measured shows the orderings that the paper reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reproduction.intervals import SeedSpread, difference_interval
from reproduction.paper import Claim, load_paper

__all__ = ["Judgement", "judged", "notes", "paper_difference", "resampled", "seed_spread"]

Results = Mapping[str, Sequence[dict[str, Any]]]  # "TABLE ROW" -> the results of its seeds


@dataclass(frozen=True)
class Judgement:
    """What the results say about a claim.

    Args:
        rows: the better row and the other one, with what was measured.
        holds: whether the claim shows.
        clear: whether chance is an unlikely explanation: the 95 % interval lies on one side of the
            limit, both rows have more than one seed, and none diverged. Or the runs of both rows
            are equal, seed by seed.
        verdict: both in words, with the numbers.
        interval: the difference of AP and the ends of its interval, which are equal if the results
            have none; None if one row diverged, and for a claim about something else.
    """

    rows: tuple[str, str]
    holds: bool
    clear: bool
    verdict: str
    interval: tuple[float, float, float] | None = None


def judged(claims: Sequence[Claim], measured: Results) -> Iterator[tuple[Claim, Judgement]]:
    """Each claim whose rows have results. It is about the best of its worse rows."""
    spread = seed_spread(measured)
    for claim in claims:
        others = [row for row in claim.worse if row in measured]
        if claim.better in measured and others:
            other = max(others, key=lambda row: _mean(measured[row], "AP") or 0.0)
            yield claim, _judge(claim, other, measured, spread)


def notes(found: Sequence[tuple[Claim, Judgement]]) -> str:
    """A Markdown list of why claims do not show, or not clearly, as far as it is known."""
    lines = [
        f"- {claim.text}: {claim.note}"
        for claim, judgement in found
        if claim.note and not (judgement.holds and judgement.clear)
    ]
    return "".join(f"{line}\n" for line in lines)


def paper_difference(claim: Claim) -> float | None:
    """The paper's AP of the better row less that of the best worse one; None if it has none."""
    if claim.measure != "AP":
        return None
    rows = {str(row): row for table in load_paper().values() for row in table.rows}
    worse = [rows[name].metrics["AP"] for name in claim.worse if not rows[name].diverges]
    return rows[claim.better].metrics["AP"] - max(worse) if worse else None


def seed_spread(measured: Results) -> SeedSpread:
    """How much AP varies over the seeds of all rows. Rows that share their runs count once."""
    rows = {tuple(map(id, results)): results for results in measured.values()}
    return SeedSpread.of_rows([r["AP"] for r in results if "AP" in r] for results in rows.values())


def resampled(results: Sequence[dict[str, Any]]) -> list[list[float]]:
    """AP on the resamples, of each seed that did not diverge; empty if one has none."""
    found = [r.get("resampled_AP") for r in results if "AP" in r]
    return found if all(found) else []  # type: ignore[return-value]


def _judge(claim: Claim, other: str, measured: Results, spread: SeedSpread) -> Judgement:
    results = measured[claim.better], measured[other]
    better, worse = (_mean(r, claim.measure) for r in results)
    shown = _shown(claim.better, better, claim), _shown(other, worse, claim)
    doubts = []
    if min(map(len, results)) == 1:
        doubts.append("one seed")  # nobody knows what another would give
    if better is None or worse is None:
        verdict = "**no**: diverged" if better is None else "yes: the other diverged"
        return Judgement(shown, better is not None, not doubts, ", ".join([verdict, *doubts]))
    for row, runs in zip((claim.better, other), results):
        if diverged := sum("AP" not in r for r in runs):
            doubts.append(f"{diverged} of {len(runs)} seeds of {row} diverged")
    if claim.measure == "early_loss":
        holds = better < worse
        verdict = f"{'yes' if holds else '**no**'}: {worse / better:.1f} times as large"
        return Judgement(shown, holds, not doubts, ", ".join([verdict, *doubts]))
    difference = low = high = better - worse
    found = f"{difference:+.1f}"
    of_better, of_worse = map(resampled, results)
    if of_better and of_better == of_worse:
        holds = claim.within is not None  # the two rows train alike: no chance is left
        verdict = ", ".join([f"{'yes' if holds else '**no**'}: the runs are equal", *doubts])
        return Judgement(shown, holds, not doubts, verdict, (0.0, 0.0, 0.0))
    if of_better and of_worse:
        low, high = difference_interval(of_better, of_worse, difference, spread)
        found += f" [{low:+.1f}, {high:+.1f}]"
    else:
        doubts.append("no interval")
    if claim.within is None:
        holds, clear = difference > 0, low > 0 or high < 0
    else:
        limit = claim.within
        holds = abs(difference) <= limit
        clear = (-limit <= low and high <= limit) if holds else (low > limit or high < -limit)
        found += f" (within {limit:g})"
    answer = ("yes" if holds else "**no**") if clear else "not clear"
    verdict = ", ".join([f"{answer}: {found}", *doubts])
    interval = (difference, low, high)
    return Judgement(shown, holds, clear and not doubts, verdict, interval)


def _shown(row: str, value: float | None, claim: Claim) -> str:
    name = "" if claim.measure == "AP" else f"{claim.measure.replace('_', ' ')} "
    return f"{row}: {name}" + ("diverged" if value is None else f"{value:.1f}")


def _mean(results: Sequence[dict[str, Any]], measure: str) -> float | None:
    values = [r[measure] for r in results if measure in r]
    return statistics.mean(values) if values else None
