"""Compare the config of ``retina init`` with the recipe of ``retina_R50_600.yaml`` at equal cost.

    python -m benchmarks.init_recipe
    python -m benchmarks.init_recipe --sets rods --arms init --split dev

All arms train the same small model (``benchmarks/init_base.yaml``) from scratch on one CPU thread
for the same CPU time, which decides the number of iterations. They differ in everything else:

- ``recipe``: ``retina_R50_600.yaml`` as it is, with its steps and its warm-up scaled;
- ``recipe, own size``: the same with images of their own size instead of 600 px;
- ``init``: what ``retina init`` writes.

Writes a JSON file after each run; runs that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from benchmarks.drawn_sets import SETS, write_set
from benchmarks.machine import describe_machine
from retina_plugin.cli.init import make_recipe, write_recipe
from retina_plugin.cli.train import load_model
from retina_plugin.data import digits
from retina_plugin.engine import Trainer, setup_cfg
from retina_plugin.engine.timing import measure_step
from retina_plugin.errors import ConfigError

__all__ = ["ARMS", "main"]

_BASE = str(Path(__file__).with_name("init_base.yaml"))
_PAPER_ITERATIONS = 90_000
_OWN_SIZES = {"digits": 160, "cells": 192, "rods": 160}  # shorter sides (pixels)
ARMS = ("recipe", "recipe, own size", "init")


def dataset_names(name: str, folder: Path) -> dict[str, str]:
    """Split -> its name for ``DATASETS``."""
    if name != "digits":
        return write_set(name, folder)
    root = digits.prepare()
    return {split: f"coco:{root / split}.json:{root / split}" for split in ("train", "dev", "val")}


def recipe_settings(name: str, arm: str, train: str, seconds: float) -> list[str]:
    """The recipe for this set, with as many iterations as the time holds."""
    classes = len(digits.CLASSES) if name == "digits" else len(SETS[name].classes)
    opts = ["MODEL.RETINANET.NUM_CLASSES", str(classes), "DATASETS.TRAIN", f"({train!r},)"]
    if arm != "recipe":
        size = _OWN_SIZES[name]
        opts += ["INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MIN_SIZE_TEST", str(size)]
    opts += ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0", "MODEL.DEVICE", "cpu"]
    cost = measure_step(setup_cfg(_BASE, opts), clock=time.process_time)
    last = max(9, round(seconds / cost.seconds))
    steps = (round(last * 2 / 3), round(last * 8 / 9))
    warm_up = max(1, round(500 * last / _PAPER_ITERATIONS))
    opts += ["SOLVER.MAX_ITER", str(last), "SOLVER.STEPS", str(steps)]
    return [*opts, "SOLVER.WARMUP_ITERS", str(warm_up), "SOLVER.CHECKPOINT_PERIOD", str(last)]


def train(config_file: str, opts: list[str], log: Path) -> tuple[float, float]:
    """Run the command ``retina train``; CPU seconds and wall clock of its process."""
    command = [sys.executable, "-m", "retina_plugin", "train", "--num-gpus", "0"]
    start = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(
            [*command, "--config-file", config_file, *opts],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise ConfigError(f"the training failed, see {log}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """AP and AP50 of ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; 0 if there are no detections."""
    results = Trainer.test(cfg, load_model(cfg, resume=False))
    return {name: float(np.nan_to_num(results["bbox"][name])) for name in ("AP", "AP50")}


def run(name: str, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one arm."""
    names = dataset_names(name, args.output / "sets")
    folder = args.output / f"{name}-{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{args.split}"
    folder.mkdir(parents=True, exist_ok=True)
    if arm == "init":
        config_file, opts = init_config(names, folder, args.seconds), []
    else:
        config_file, opts = _BASE, recipe_settings(name, arm, names["train"], args.seconds)
    opts += ["SEED", str(seed), "OUTPUT_DIR", str(folder), "DATASETS.TEST", "()"]
    opts += ["TEST.EVAL_PERIOD", "0", "MODEL.DEVICE", "cpu"]
    cpu, wall = train(config_file, opts, folder / "train.txt")
    opts += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    cfg = setup_cfg(config_file, [*opts, "DATASETS.TEST", f"({names[args.split]!r},)"])
    return {
        "set": name,
        "arm": arm,
        "seed": seed,
        "split": args.split,
        "iterations": cfg.SOLVER.MAX_ITER,
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "size": list(cfg.INPUT.MIN_SIZE_TRAIN),
        "learning_rate": cfg.SOLVER.BASE_LR,
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(wall, 1),
        **{key: round(value, 2) for key, value in evaluate(cfg).items()},
    }


def init_config(names: dict[str, str], folder: Path, seconds: float) -> str:
    """What ``retina init --base benchmarks/init_base.yaml --hours`` writes, timed in CPU time."""
    output = folder / "init.yaml"
    given = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    clock = time.process_time
    recipe = make_recipe(names["train"], None, _BASE, output, seconds / 3600, given, clock)
    write_recipe(recipe, output)
    return str(output)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a table of Markdown."""
    keys = (
        "set arm seed size batch learning_rate iterations cpu_seconds wall_seconds AP AP50".split()
    )
    return tabulate([[r[key] for key in keys] for r in results], keys, tablefmt="github")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.init_recipe", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--sets", nargs="+", default=["digits", *SETS], choices=["digits", *SETS])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--seconds", type=float, default=240, help="CPU time of a training (240)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--split", default="val", choices=["dev", "val"])
    parser.add_argument("--output", type=Path, default=Path("output", "init_recipe"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "init_recipe.json"
    results = json.loads(path.read_text())["results"] if path.exists() else []
    done = {(r["set"], r["arm"], r["seed"], r["split"]) for r in results}
    for seed in args.seeds:
        for name in args.sets:
            for arm in args.arms:
                if (name, arm, seed, args.split) in done:
                    continue
                results.append(run(name, arm, seed, args))
                content = {
                    "seconds": args.seconds,
                    "machine": describe_machine("cpu", 1, heap_kept=False),
                    "results": results,
                }
                path.write_text(json.dumps(content, indent=1))
                print(table(results), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
