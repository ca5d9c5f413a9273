"""``retina init DATASET --output FILE``: the config for a dataset and this machine.

What it decides stands in the file, each value with its reason. Nothing is trained but a few steps,
to see how long one takes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from retina_plugin.cache import atomic_write
from retina_plugin.engine import Trainer, check_devices, setup_cfg
from retina_plugin.engine.checks import check_config
from retina_plugin.engine.console import console
from retina_plugin.engine.timing import measure_step
from retina_plugin.errors import ConfigError
from retina_plugin.recipe import Facts, Machine, Recipe, decide

__all__ = ["argument_parser", "main", "make_recipe", "write_recipe"]

_BASE = "retina_R50_600.yaml"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina init",
        description="Write the config for a dataset and this machine, each value with its reason.",
        epilog="KEY VALUE pairs at the end are taken as they are; the rest is decided around them.",
    )
    parser.add_argument("train", metavar="DATASET", help="e.g. coco:train.json:images/")
    parser.add_argument("--val", metavar="DATASET", help="to evaluate on")
    parser.add_argument("--output", required=True, metavar="FILE", help="the config, a .yaml file")
    parser.add_argument(
        "--base", default=_BASE, metavar="FILE", help=f"the model to start from ({_BASE})"
    )
    parser.add_argument(
        "--hours", type=float, metavar="H", help="the training may take this long here"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Decide, check what was decided, and write the file.

    Raises:
        ConfigError: a dataset or the base cannot be read, the output is there already or cannot be
            written, or a step of the training fails.
    """
    args = argument_parser().parse_intermixed_args(argv)
    output = Path(args.output)
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {output}: name a .yaml file")
    if output.exists() and not args.overwrite:
        raise ConfigError(f"{output} is there already: --overwrite replaces it")
    if args.hours is not None and not 0 < args.hours < float("inf"):
        raise ConfigError(f"--hours {args.hours}: give more than 0")
    with console(0):
        recipe = make_recipe(args.train, args.val, args.base, output, args.hours, args.opts)
    write_recipe(recipe, output)
    for text in recipe.warnings:
        print(f"Warning: {text}")
    print(f"{output}\nTrain: retina train --config-file {output}")


def make_recipe(
    train: str,
    val: str | None,
    base: str,
    output: Path,
    hours: float | None = None,
    opts: list[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Recipe:
    """Load the base, read the datasets and decide.

    Args:
        train, val: datasets.
        base: a config file, or the name of one of the paper's.
        output: where the config will be written.
        hours: that the training may take; None: as long as its rule asks for.
        opts: overrides of the base, [key, value, ...], which the config keeps.
        clock: measures the timed step.

    Raises:
        ConfigError: see :func:`main`.
    """
    opts = list(opts or [])
    tests = () if val is None else (val,)
    names = ["DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr(tests)]
    cfg = setup_cfg(base, [*opts, *names])
    processes = max(check_devices(cfg, None), 1)
    given = frozenset(opts[::2])
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        cfg = Trainer.auto_scale_workers(cfg, processes)
        given -= {"SOLVER.REFERENCE_WORLD_SIZE"}  # what is decided is for these processes
    facts = Facts.read(train, val)
    solver = setup_cfg(base).SOLVER  # whose learning rate belongs to its own batch
    recipe = Recipe(_base_name(base, output), cfg, given, solver)
    time_step = partial(measure_step, processes=processes, clock=clock)
    decide(recipe, facts, Machine(processes, os.cpu_count() or 1, time_step), hours)
    check_config(recipe.cfg)  # what `retina train` would check
    return recipe


def _base_name(base: str, output: Path) -> str:
    """How the written file names its base: a file as seen from its own folder."""
    path = os.path.expanduser(base)
    if "://" in base or not os.path.isfile(path):
        return base
    return os.path.relpath(path, output.parent)


def write_recipe(recipe: Recipe, output: Path) -> None:
    """Write the file.

    Raises:
        ConfigError: the folder cannot be written.
    """
    text = recipe.yaml()
    try:
        with atomic_write(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output} ({error.strerror})") from None
