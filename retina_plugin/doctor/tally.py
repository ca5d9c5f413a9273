"""Faults of one kind counted, with the first of them named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .findings import Finding, Severity

__all__ = ["Kind", "Tally"]


class Kind(NamedTuple):
    """A kind of fault, e.g. "images without an id"."""

    severity: Severity
    what: str  # in the plural
    fix: str = ""


class Tally:
    """Counts faults by kind and keeps an example of each: one finding a kind, not one a fault.

    Args:
        where: the file or dataset.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: dict[Kind, tuple[int, str]] = {}

    def add(self, kind: Kind, example: str) -> None:
        """Count one fault. ``example`` names it: the file, the id."""
        count, first = self._found.get(kind, (0, example))
        self._found[kind] = (count + 1, first)

    def add_where(self, kind: Kind, mask: np.ndarray, describe: Callable[[int], str]) -> None:
        """Count the True entries of ``mask`` (N,); ``describe(i)`` names the fault at index i."""
        count = int(np.count_nonzero(mask))
        if count:
            before, first = self._found.get(kind, (0, ""))
            self._found[kind] = (before + count, first or describe(int(np.argmax(mask))))

    def findings(self, total: int) -> Iterator[Finding]:
        """A finding for each kind that was counted.

        Args:
            total: how many images, annotations, ... were looked at.
        """
        for kind, (count, first) in self._found.items():
            yield Finding(
                kind.severity,
                self._where,
                f"{kind.what} ({count} of {total}, the first: {first})",
                kind.fix,
            )
