"""The numbers of the paper, from ``docs/paper.yaml`` of the checkout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from retina_plugin.errors import ConfigError

__all__ = ["METRICS", "Row", "Table", "checkout", "header_numbers", "load_paper"]

# What a row may have, in the order of the paper's columns; ms is the time of an image on an M40.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ms")

_PAPER = Path("docs", "paper.yaml")


@dataclass(frozen=True)
class Row:
    """One experiment: ``config`` is seen from the checkout's root, AP in percent, ``ms`` in ms."""

    table: str
    name: str
    config: str
    metrics: dict[str, float]
    diverges: bool = False


@dataclass(frozen=True)
class Table:
    """A table ("1a" to "1e", "2", "3") or section ("5.1"); ``split`` is minival or test-dev."""

    key: str
    title: str
    split: str
    rows: tuple[Row, ...]


def checkout() -> Path:
    """The root of the checkout: the folder above the package, else the current one.

    Raises:
        ConfigError: neither has ``docs/paper.yaml`` (the package is installed without it).
    """
    folders = Path(__file__).resolve().parents[1], Path.cwd()
    for folder in folders:
        if (folder / _PAPER).is_file():
            return folder
    raise ConfigError(
        f"no {_PAPER} in {' or '.join(map(str, dict.fromkeys(folders)))}: run this in a checkout"
    )


def load_paper() -> dict[str, Table]:
    """The tables by their keys; tables and rows are in the order of the file.

    Raises:
        ConfigError: no ``docs/paper.yaml``, or one that is not as its comment says.
    """
    path = checkout() / _PAPER
    try:
        tables = yaml.safe_load(path.read_text(encoding="utf-8"))["tables"]
        return {key: _table(key, **fields) for key, fields in tables.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _table(key: str, title: str, split: str, rows: Iterable[dict[str, Any]]) -> Table:
    parsed = tuple(_row(key, **fields) for fields in rows)
    names = [row.name for row in parsed]
    if len(set(names)) != len(names):
        raise ValueError(f"table {key} has two rows of one name")
    return Table(key, title, split, parsed)


def _row(table: str, name: str, config: str, diverges: bool = False, **metrics: float) -> Row:
    unknown = metrics.keys() - set(METRICS)
    if unknown:
        raise ValueError(f"table {table}, row {name}: unknown {', '.join(sorted(unknown))}")
    if diverges == bool(metrics):
        raise ValueError(f"table {table}, row {name}: give either metrics or diverges: true")
    return Row(
        table, name, config, {m: float(metrics[m]) for m in METRICS if m in metrics}, diverges
    )


def header_numbers(row: Row) -> str:
    """What the header of the row's config says: "AP 34.0, AP50 52.5, AP75 36.5", or "diverges"."""
    if row.diverges:
        return "diverges"
    return ", ".join(f"{name} {value:.1f}" for name, value in row.metrics.items() if name != "ms")
