"""``retina replay FILE``: repeat a training step that was not finite, and show its numbers."""

from __future__ import annotations

import argparse
import logging
import math
import sys

from tabulate import tabulate

from retina_plugin.engine.console import LOGGERS, console
from retina_plugin.engine.diagnosis import Diagnosis
from retina_plugin.engine.replay import Replay, replay
from retina_plugin.errors import ConfigError

__all__ = ["main", "report"]


def report(result: Replay) -> str:
    """The tables of a repeated step, and whether it is finite this time."""
    record = result.record
    source = result.checkpoint or "the weights that the training began with"
    lines = [f"Iteration {record.iteration} (counted from 0), from {source}"]
    if not result.checkpoint:
        lines.append("There was no checkpoint before it: with SEED -1 the weights are others.")
    if result.diagnosis is not None:
        lines += ["", *_tables(result.diagnosis)]
    lines.append("")
    if result.stopped_at is None:
        lines.append("The step is finite this time.")
    elif result.is_reproduced:
        lines.append(f"The step is not finite again: {result.error}")
    else:
        lines.append(f"The run did not get there: {result.error}")
    return "\n".join(lines)


def _tables(diagnosis: Diagnosis) -> list[str]:
    levels = diagnosis.levels
    kinds = list(dict.fromkeys(kind for values in levels.values() for kind in values))
    tables = []
    if kinds:
        rows = [
            [level, *(_number(_largest(values.get(kind, []))) for kind in kinds)]
            for level, values in levels.items()
        ]
        tables += ["Largest absolute values", _table(rows, ["level", *kinds]), ""]
    losses = list(diagnosis.losses)
    rows = [["the batch", *map(_number, diagnosis.losses.values()), "", ""]]
    for image in diagnosis.images:
        alone = [_number(image.losses.get(name)) for name in losses]
        finite = {True: "finite", False: "not finite", None: ""}[image.gradient_is_finite]
        bad = f"{image.bad_input} not finite" if image.bad_input else ""
        rows.append([image.file_name, *alone, finite, bad])
    tables += ["Losses, of each image alone", _table(rows, ["", *losses, "gradient", "input"]), ""]
    rows = [[name, _number(value)] for name, value in diagnosis.gradients.items()]
    tables += ["Gradients", _table(rows, ["parameter", "largest"]), ""]
    tables.append(f"Largest weight {_number(diagnosis.largest_weight)}")
    if diagnosis.weights:
        tables.append(f"Weights that are not finite: {', '.join(diagnosis.weights)}")
    if diagnosis.module:
        tables.append(f"First module whose output is not finite: {diagnosis.module}")
    return tables


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True)


def _largest(values: list[float]) -> float | None:
    bad = [x for x in values if math.isnan(x)]
    return bad[0] if bad else max(values, default=None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables. Exit status 0 if the step is not finite again, 1 otherwise.

    Raises:
        ConfigError: see :func:`retina_plugin.engine.replay.replay`.
    """
    parser = argparse.ArgumentParser(
        prog="retina replay",
        description=(
            "Repeat a training step that was not finite, from the last checkpoint before it, "
            "and show the numbers of each level, loss, image and gradient. Nothing is written. "
            "Exit status 0: the step is not finite again; 1: it is finite this time, or an error."
        ),
    )
    parser.add_argument("file", metavar="FILE", help="OUTPUT_DIR/nonfinite_<iteration>.json")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="what to change in the training's config, e.g. SOLVER.BASE_LR 0.001",
    )
    args = parser.parse_args(argv)
    if len(args.opts) % 2:
        raise ConfigError(f"KEY VALUE pairs follow the file, got {' '.join(args.opts)}")
    for name in LOGGERS:  # no log file here: only warnings, which the console prints
        logging.getLogger(name).setLevel(logging.INFO)
    with console(0):
        result = replay(args.file, args.opts)
    print(report(result))
    sys.exit(0 if result.is_reproduced else 1)
