"""The numbers of the paper, read from ``docs/paper.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from retina_plugin.errors import ConfigError

__all__ = [
    "METRICS",
    "Claim",
    "Row",
    "Table",
    "checkout",
    "load_claims",
    "load_figures",
    "load_paper",
]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # COCO's, in the order of the paper's columns
_COLUMNS = (*METRICS, "ms")


def checkout() -> Path:
    """The root of the checkout that this file lies in."""
    return Path(__file__).resolve().parents[1]


PAPER = checkout() / "docs" / "paper.yaml"


@dataclass(frozen=True)
class Row:
    """One experiment of the paper.

    Args:
        table: key of its table.
        name: its name in the table.
        config: the config file that repeats it, relative to the checkout's root.
        metrics: AP as printed (percent), and "ms", the time of an image on an M40 (milliseconds).
        diverges: whether the paper's training diverges; such a row has no metrics.
        settings: config key -> value, of everything that the paper says about the row.
    """

    table: str
    name: str
    config: str
    metrics: dict[str, float]
    diverges: bool
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.table} {self.name}"


@dataclass(frozen=True)
class Table:
    """A table of the paper ("1a" to "1e", "2", "3"), or "5.1" for the text of that section.

    Args:
        key: its number.
        title: what its rows compare.
        section: the section that discusses it.
        split: the images that its AP is measured on, minival or test-dev.
        rows: its experiments, in the order of the paper.
    """

    key: str
    title: str
    section: str
    split: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Claim:
    """An ordering of rows that the paper reports.

    Args:
        text: the claim in words.
        better: "TABLE ROW" of the row with the higher AP.
        worse: "TABLE ROW" of the others; the claim is about the best of those that were measured.
        measure: what is compared: AP (higher is better), or early_loss (lower is better).
        within: for a claim that two rows are about equal: the largest difference.
        note: what explains a claim that does not show here; it is printed only then.
    """

    text: str
    better: str
    worse: tuple[str, ...]
    measure: str = "AP"
    within: float | None = None
    note: str = ""


def load_paper(path: Path = PAPER) -> dict[str, Table]:
    """Table key -> table, in the order of the file.

        load_paper()["1b"].rows[5].metrics["AP"]  # 34.0

    Raises:
        ConfigError: a file that is missing or not as its header says.
    """
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            key: _table(key, file["names"], file["shared"], **fields)
            for key, fields in file["tables"].items()
        }
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def load_claims(path: Path = PAPER) -> list[Claim]:
    """The orderings that the paper reports, in the order of the file."""
    claims = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
    return [Claim(**{**claim, "worse": tuple(claim["worse"])}) for claim in claims]


def load_figures(path: Path = PAPER) -> dict[str, dict[str, Any]]:
    """Number of a figure -> what it shows beside the rows of the tables, as the file has it."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))["figures"]


def _table(
    key: str,
    names: Mapping[str, str],
    shared: Mapping[str, Any],
    title: str,
    section: str,
    split: str,
    rows: list[dict[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> Table:
    inherited = {**shared, **(settings or {})}
    parsed = tuple(_row(key, names, inherited, **fields) for fields in rows)
    if len({row.name for row in parsed}) != len(parsed):
        raise ValueError(f"table {key} has two rows of one name")
    return Table(key, title, section, split, parsed)


def _row(
    table: str,
    names: Mapping[str, str],
    inherited: Mapping[str, Any],
    name: str,
    config: str,
    diverges: bool = False,
    **fields: Any,
) -> Row:
    metrics = {column: float(fields.pop(column)) for column in _COLUMNS if column in fields}
    if diverges == bool(metrics):
        raise ValueError(f"table {table}, row {name}: give either metrics or diverges: true")
    try:
        settings = _settings(names, {**inherited, **fields})
    except KeyError as error:
        raise ValueError(f"table {table}, row {name}: unknown {error}") from None
    return Row(table, name, config, metrics, diverges, settings)


def _settings(names: Mapping[str, str], fields: dict[str, Any]) -> dict[str, Any]:
    """Config key -> value."""
    size, sides, scales = (fields.pop(name) for name in ("size", "sides", "scales"))
    settings = {
        "INPUT.MIN_SIZE_TRAIN": [size],
        "INPUT.MIN_SIZE_TEST": size,
        "MODEL.ANCHOR_GENERATOR.SIZES": [
            [side * 2 ** (k / scales) for k in range(scales)] for side in sides
        ],
    }
    return settings | {
        name if "." in name else names[name]: value for name, value in fields.items()
    }
