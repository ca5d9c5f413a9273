"""Which runs the rows of the paper's tables need, for :mod:`reproduction.reproduce`."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from reproduction.paper import Row, checkout, load_paper
from retina_plugin.config import flatten
from retina_plugin.engine.setup import setup_cfg
from retina_plugin.errors import ConfigError

__all__ = ["Run", "plan", "recipe", "run_key", "select_rows"]

_MINI = Path("reproduction", "mini.yaml")
_MINI_ANCHORS = 0.5  # the embedded digits are about half as large as COCO's objects
# OHEM's loss is a mean over the anchors that it keeps, so the learning rate of the others does not
# fit it. On digits_scenes_dev: AP 33.3 with .06, 39.2 with .12, 24.7 with .24 (OHEM 128 0.5).
_MINI_OHEM_LR = 0.12


@dataclass
class Run:
    """One training: what it is made from, and the rows whose result it is."""

    key: str
    config: Path
    opts: list[str]
    max_iter: int
    rows: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    folder: Path = Path()
    started: float = 0.0

    def iteration(self) -> int:
        """How far it is, from its metrics; 0 if it has none."""
        try:
            last = (self.folder / "metrics.json").read_text().splitlines()[-1]
            return min(json.loads(last)["iteration"] + 1, self.max_iter)
        except (OSError, IndexError, ValueError, KeyError):
            return 0


def recipe(row: Row, scale: str) -> tuple[Path, list[str], dict[str, Any]]:
    """The config file and overrides that train a row, and everything they set, as nested dicts.

    Raises:
        ConfigError: at the scale "mini", a row that differs in what that scale does not have.
    """
    path = checkout() / row.config
    if scale == "paper":
        return path, [], CfgNode.load_yaml_with_base(str(path))
    model = yaml.safe_load(path.read_text()).get("MODEL", {})
    delta = {key: model[key] for key in ("RETINANET", "ANCHOR_GENERATOR") if key in model}
    if row.table in ("1e", "2"):
        raise ConfigError(
            f"Table {row.table}: its rows differ in backbone and image size, which --scale mini "
            "does not have; use --scale paper"
        )
    anchors = delta.get("ANCHOR_GENERATOR", {})
    if "SIZES" in anchors:
        anchors["SIZES"] = [[s * _MINI_ANCHORS for s in sizes] for sizes in anchors["SIZES"]]
    merged = CfgNode.load_yaml_with_base(str(checkout() / _MINI))
    opts = []
    if delta.get("RETINANET", {}).get("SAMPLER") == "OHEM":
        solver = merged["SOLVER"]
        solver["LR_PER_IMAGE"] *= _MINI_OHEM_LR / solver["BASE_LR"]
        solver["BASE_LR"] = _MINI_OHEM_LR
        for key in ("BASE_LR", "LR_PER_IMAGE"):
            opts += [f"SOLVER.{key}", str(solver[key])]
    for node, values in delta.items():
        for key, value in flatten(values).items():
            opts += [f"MODEL.{node}.{key}", str(value)]
            target = merged["MODEL"].setdefault(node, {})
            *parents, leaf = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            target[leaf] = value
    return checkout() / _MINI, opts, merged


def run_key(settings: dict[str, Any], extra: Sequence[str], seed: int) -> str:
    """Names a run by what its files and overrides set: rows that are the same run share it."""
    settings = copy.deepcopy(settings)
    retinanet = settings["MODEL"]["RETINANET"]
    if retinanet["CLS_LOSS"] == "FocalLoss" and retinanet["FOCAL_LOSS_GAMMA"] == 0:
        retinanet["CLS_LOSS"] = "CrossEntropy"  # section 5.1: equivalent; here to the last bit
    if retinanet["CLS_LOSS"] != "FocalLoss":
        del retinanet["FOCAL_LOSS_GAMMA"]  # not read
    text = json.dumps([_same_numbers(settings), list(extra)], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-seed{seed}"


def _same_numbers(value: Any) -> Any:
    """2 and 2.0, and what differs by the rounding of a product, are the same setting."""
    if isinstance(value, dict):
        return {k: _same_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_same_numbers(v) for v in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.10g}" if is_number else value


def plan(rows: Sequence[Row], scale: str, seeds: int, extra: Sequence[str] = ()) -> list[Run]:
    """The runs of some rows, each once, seed by seed."""
    runs: dict[str, Run] = {}
    for seed in range(1, seeds + 1):
        for row in rows:
            config, opts, settings = recipe(row, scale)
            opts = [*opts, *extra, "SEED", str(seed)]
            key = run_key(settings, extra, seed)
            if key not in runs:
                max_iter = setup_cfg(str(config), opts).SOLVER.MAX_ITER
                runs[key] = Run(key, config, opts, max_iter)
            runs[key].rows.append(f"{row.table} {row.name}")
    return list(runs.values())


def select_rows(tables: Sequence[str], names: Sequence[str]) -> list[Row]:
    """Rows of the named tables ("all" for all of them), only those of ``names`` if there are any.

    Raises:
        ConfigError: a table or row that does not exist, with those that do.
    """
    paper = load_paper()
    unknown = [t for t in tables if t not in paper and t != "all"]
    if unknown:
        raise ConfigError(f"no table {unknown[0]}; known: {', '.join(paper)}, all")
    chosen = list(paper) if "all" in tables else list(dict.fromkeys(tables))
    rows = [row for key in chosen for row in paper[key].rows]
    missing = set(names) - {row.name for row in rows}
    if missing:
        known = ", ".join(row.name for row in rows)
        raise ConfigError(f"--rows: no row '{sorted(missing)[0]}'; known: {known}")
    return [row for row in rows if not names or row.name in names]
