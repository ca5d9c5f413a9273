"""The decisions in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.doctor import Severity, StepCost, check_weights, dataset_records

from .facts import Facts
from .model import (
    decide_anchors,
    decide_classes,
    decide_flips,
    decide_image_size,
    decide_weights,
    from_scratch,
)
from .schedule import (
    decide_batch,
    decide_evaluation,
    decide_rate,
    decide_schedule,
    decide_workers,
    plan,
)
from .settings import Recipe

__all__ = ["Machine", "decide"]

_TIMED_IMAGES = 2  # a process, in the timed step
_READ_IMAGES = 8  # that are read to see how long it takes


@dataclass(frozen=True)
class Machine:
    """Where the training will run.

    Args:
        processes: that train: one a GPU, or one.
        cores: of the CPU.
        time_step: measures a training step of a config, e.g. ``engine.timing.measure_step``.
    """

    processes: int
    cores: int
    time_step: Callable[[CfgNode], StepCost]


def decide(recipe: Recipe, facts: Facts, machine: Machine, hours: float | None = None) -> None:
    """Decide every key that depends on the data or on the machine.

    Args:
        recipe: of the base; gets the decisions.
        facts: of the training set.
        machine: where it will be trained.
        hours: that the training may take; None: as long as its rule asks for.

    Raises:
        ConfigError: a step of the training fails.
    """
    cfg = recipe.cfg
    solver = recipe.base_solver or cfg.SOLVER
    base_rate, base_batch = solver.BASE_LR, solver.IMS_PER_BATCH
    recipe.title += [
        "Written by `retina init`. Every value may be changed; the reason stands above it.",
    ]
    decide_classes(recipe, facts)
    decide_weights(recipe, _weights_problem(cfg))
    decide_image_size(recipe, facts)
    decide_anchors(recipe, facts)
    decide_flips(recipe, facts)
    cost = machine.time_step(_timed_config(cfg, machine.processes))
    seconds = cost.seconds / (cost.images * machine.processes)  # of training, for an image
    planned = plan(facts, from_scratch(recipe), seconds, hours)
    decide_batch(recipe, planned, cost)
    decide_rate(recipe, base_rate, base_batch)
    decide_schedule(recipe, facts, planned, seconds, cost.device)
    decide_evaluation(recipe, planned)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    decide_workers(
        recipe, seconds, _reading_seconds(cfg, facts), machine.cores, machine.processes, on_gpu
    )


def _weights_problem(cfg: CfgNode) -> str:
    errors = (f for f in check_weights(cfg) if f.severity is Severity.ERROR)
    found = next(errors, None)
    return "" if found is None else found.what


def _timed_config(cfg: CfgNode, processes: int) -> CfgNode:
    """A step of two images a process: a large model's step of a whole batch may not fit."""
    timed = cfg.clone()
    timed.DATASETS.TEST = ()
    timed.SOLVER.IMS_PER_BATCH = _TIMED_IMAGES * processes * cfg.SOLVER.ACCUMULATE
    timed.SOLVER.REFERENCE_WORLD_SIZE = 0  # it is the batch of these processes
    timed.SOLVER.MAX_ITER, timed.SOLVER.STEPS, timed.SOLVER.WARMUP_ITERS = 100, (), 0
    return timed


def _reading_seconds(cfg: CfgNode, facts: Facts) -> float:
    """Median time to read, resize and augment an image of the training set."""
    records = [r for r in dataset_records(facts.train) if r.get("annotations")]
    mapper = DATASET_MAPPER_REGISTRY.build(cfg, True)
    times = []
    for i in np.linspace(0, len(records) - 1, min(_READ_IMAGES, len(records))).round():
        start = time.perf_counter()
        mapper(records[int(i)])
        times.append(time.perf_counter() - start)
    return float(np.median(times))
