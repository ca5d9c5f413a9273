"""Which training runs the rows of the paper's tables need, for :mod:`reproduction.reproduce`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reproduction.paper import Row, checkout, load_paper
from retina_plugin.config import flatten
from retina_plugin.engine.setup import load_config, setup_cfg
from retina_plugin.errors import ConfigError, check_choice

__all__ = [
    "MINI_DATASET",
    "MINI_TABLES",
    "Run",
    "is_current",
    "plain_value",
    "plan",
    "recipe",
    "row_key",
    "run_key",
    "select_rows",
]

MINI_TABLES = ("5.1", "1a", "1b", "1c", "1d", "3")  # whose rows the mini scale has
MINI_DATASET = "digits_sparse_val"  # that its AP is measured on
MINI = checkout() / "reproduction" / "mini.yaml"
_MINI_ANCHORS = 0.5  # the embedded digits are about half as large as COCO's objects
# OHEM's loss is a mean over the anchors that it keeps, so it needs another learning rate than the
# other rows. AP on digits_sparse_dev with .015 / .03 / .06 is 2.4 / 9.3 / 2.2 (OHEM 128 0.5).
# A run of OHEM therefore logs that SOLVER.BASE_LR was changed without the batch: as intended.
_MINI_OHEM_LR = 0.03


@dataclass
class Run:
    """One training, and the rows that it is the result of.

    Args:
        key: its name in the ledger.
        config: its config file.
        opts: what overrides the file, as ``KEY VALUE`` pairs.
        max_iter: its number of iterations.
        rows: "TABLE ROW" of each of its rows.
        extra: of ``opts``, those that are not the rows' own (``--set``).
        process: what trains it, once started.
        folder: its ``OUTPUT_DIR``, once started.
        started: when it was started (seconds, ``time.monotonic``).
    """

    key: str
    config: Path
    opts: list[str]
    max_iter: int
    rows: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    folder: Path = Path()
    started: float = 0.0

    def iteration(self) -> int:
        """Iterations done, according to its ``metrics.json``; 0 if there is none yet."""
        try:
            last = (self.folder / "metrics.json").read_text().splitlines()[-1]
            return min(json.loads(last)["iteration"] + 1, self.max_iter)
        except (OSError, IndexError, ValueError, KeyError):
            return 0


def plan(rows: Sequence[Row], scale: str, seeds: int, extra: Sequence[str] = ()) -> list[Run]:
    """The runs that some rows need. Rows that are the same experiment share a run.

    Args:
        rows: what is to be reproduced.
        scale: "paper" for the rows' own configs, "mini" for the small model (see :func:`recipe`).
        seeds: each row is trained with the seeds 1 to this number.
        extra: ``KEY VALUE`` pairs that override every run's config.
    """
    runs: dict[str, Run] = {}
    for seed in range(1, seeds + 1):
        for row in rows:
            key = row_key(row, scale, extra, seed)
            if key not in runs:
                config, overrides = recipe(row, scale)
                opts = [str(x) for pair in overrides.items() for x in pair]
                opts += [*extra, "SEED", str(seed)]
                max_iter = setup_cfg(str(config), opts).SOLVER.MAX_ITER
                runs[key] = Run(key, config, opts, max_iter, extra=list(extra))
            runs[key].rows.append(str(row))
    return list(runs.values())


def row_key(row: Row, scale: str, extra: Sequence[str], seed: int) -> str:
    """The name in the ledger of a row's run with one seed; see :func:`run_key`."""
    config, overrides = recipe(row, scale)
    return run_key(flatten(load_config(str(config))) | overrides, extra, seed)


def is_current(key: str, name: str, scale: str, extra: Sequence[str] = ()) -> bool:
    """Whether a run of the ledger has the settings that a row's configs have now.

    Args:
        key: the run's.
        name: "TABLE ROW".
        scale: of the run.
        extra: the overrides (``--set``) that it may have.
    """
    return key.rpartition("-seed")[0] == _current(name, scale, tuple(extra))


@functools.cache
def _current(name: str, scale: str, extra: tuple[str, ...]) -> str:
    for table in load_paper().values():
        for row in table.rows:
            if str(row) == name:
                with contextlib.suppress(ConfigError):  # the scale does not have it
                    return row_key(row, scale, extra, 1).rpartition("-seed")[0]
    return ""  # no longer a row


def recipe(row: Row, scale: str) -> tuple[Path, dict[str, Any]]:
    """The config file that trains a row, and what overrides it (key -> value).

    At the scale "mini", the file is ``reproduction/mini.yaml`` and the overrides are the row's
    loss, sampler and anchors.

    Raises:
        ConfigError: a row of Table 1e or 2 at the scale "mini".
    """
    config = checkout() / row.config
    if scale == "paper":
        return config, {}
    if row.table in ("1e", "2"):
        raise ConfigError(
            f"Table {row.table}: its rows differ in backbone and image size, which --scale mini "
            "does not have; use --scale paper"
        )
    own = flatten(yaml.safe_load(config.read_text()))  # without the bases
    groups = ("MODEL.RETINANET.", "MODEL.ANCHOR_GENERATOR.")
    overrides = {key: value for key, value in own.items() if key.startswith(groups)}
    sizes = "MODEL.ANCHOR_GENERATOR.SIZES"
    if sizes in overrides:
        overrides[sizes] = [[s * _MINI_ANCHORS for s in level] for level in overrides[sizes]]
    if overrides.get("MODEL.RETINANET.SAMPLER") == "OHEM":
        overrides = {"SOLVER.BASE_LR": _MINI_OHEM_LR, **overrides}
    return MINI, overrides


def run_key(settings: dict[str, Any], extra: Sequence[str], seed: int) -> str:
    """The name of a run in the ledger: a hash of its settings, and its seed.

    Runs that compute the same have the same key. ``IMPORTS`` does not count, so a run keeps its
    key if a file moves.

    Args:
        settings: config key -> value, of the config file with its bases and overrides.
        extra: more overrides, as ``KEY VALUE`` pairs.
        seed: its ``SEED``.
    """
    settings = {key: value for key, value in settings.items() if key != "IMPORTS"}
    loss, gamma = "MODEL.RETINANET.CLS_LOSS", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"
    if not {loss, gamma} & {*extra[::2]}:
        if settings[loss] == "FocalLoss" and settings[gamma] == 0:
            settings[loss] = "CrossEntropy"  # the same to the last bit (section 5.1)
        if settings[loss] != "FocalLoss":
            del settings[gamma]  # only FocalLoss reads it
    text = json.dumps([plain_value(settings), list(extra)], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-seed{seed}"


def plain_value(value: Any) -> Any:
    """A setting in a form in which equal settings are equal.

    2, 2.0 and "2" become the same. So do a list and a tuple, and numbers that agree in the first
    ten significant digits.
    """
    if isinstance(value, dict):
        return {key: plain_value(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(v) for v in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.10g}" if is_number else value


def select_rows(tables: Sequence[str], names: Sequence[str]) -> list[Row]:
    """The rows of some tables.

    Args:
        tables: keys of tables; "all" stands for all of them.
        names: the rows to keep; none for all rows.

    Raises:
        ConfigError: an unknown table or row; the message lists the known ones.
    """
    paper = load_paper()
    for table in tables:
        check_choice("TABLE", table, [*paper, "all"])
    chosen = list(paper) if "all" in tables else list(dict.fromkeys(tables))
    rows = [row for key in chosen for row in paper[key].rows]
    for name in names:
        check_choice("--rows", name, [row.name for row in rows])
    return [row for row in rows if not names or row.name in names]
