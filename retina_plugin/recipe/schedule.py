"""What the machine decides: batch, learning rate, iterations, evaluations, workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from detectron2.config import CfgNode

from retina_plugin.doctor import StepCost

from .facts import Facts
from .model import from_scratch, is_timm
from .settings import Recipe

__all__ = [
    "Plan",
    "batch_size",
    "decide_batch",
    "decide_evaluation",
    "decide_rate",
    "decide_schedule",
    "decide_workers",
    "drawn_images",
    "plan",
]

# The paper's schedule on COCO (section 4.1): 90,000 iterations of 16 images at a rate of .01
_PAPER_DRAWN, _PAPER_IMAGES = 90_000 * 16, 118_287
_PAPER_RATE, _PAPER_BATCH, _PAPER_WARM_UP = 0.01, 16, 500
_SCRATCH_LENGTH = 3  # times: half of what He et al. train from scratch (arXiv:1811.08883)
_SCRATCH_RATE = 4  # times: norms that are trained allow it (ScratchDet, arXiv:1810.08425)
_ITERATIONS = 2000  # below it, a smaller batch gives more steps of the optimizer
_NORM_BATCH = 4  # images: batch norm's statistics of fewer are noise (arXiv:1803.08494, Figure 1)
_MEMORY = 0.8  # share of the memory that a step may take
_WARM_UP = 1 / 20  # of the iterations, at most
_EVALUATIONS = 10
_EVALUATION_SHARE = 0.1  # of the time, for evaluations
_INFERENCE = 1 / 3  # of a training step: a forward pass, without the backward pass's two
_READING = 0.05  # of a step: reading that takes less on a CPU needs no process of its own
_MARGIN = 1.5  # workers for those that are just enough
_MAX_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """How long to train.

    Args:
        drawn: images that the training draws, each as often as its epochs say.
        evaluations: of the val set.
        is_cut: whether the time was not enough for what the rule asks for.
    """

    drawn: float
    evaluations: int
    is_cut: bool = False


def drawn_images(images: int, scratch: bool) -> float:
    """Images that a training of a set of this size draws: epochs times images.

    The paper's 12 epochs of 118,287 images, and as many more as the square root of the set is
    smaller: 3,000 images get 76 epochs. That lies between Detectron2's own schedules of small sets
    (Pascal VOC: 17 epochs of 16,551 images, this rule 33; Cityscapes: 65 of 2,975, this rule 77).
    """
    return _PAPER_DRAWN * math.sqrt(images / _PAPER_IMAGES) * (_SCRATCH_LENGTH if scratch else 1)


def plan(facts: Facts, scratch: bool, seconds: float, hours: float | None) -> Plan:
    """How much fits into the time.

    Args:
        seconds: of training for an image.
        hours: that training and evaluation may take; None: as long as the rule asks for.
    """
    wanted = drawn_images(facts.images, scratch)
    drawn = wanted if hours is None else min(wanted, hours * 3600 / seconds)
    evaluations = 0
    if facts.val_images:
        one = facts.val_images * _INFERENCE  # in images of training
        evaluations = max(1, min(_EVALUATIONS, int(_EVALUATION_SHARE * drawn / one)))
        if hours is not None:
            drawn = min(drawn, max(hours * 3600 / seconds - evaluations * one, 1))
    return Plan(max(drawn, 1), evaluations, drawn < wanted)


def batch_size(cfg: CfgNode, drawn: float, holds: int, processes: int) -> tuple[int, str]:
    """Images of a batch, and why: the base's, less where memory or the number of steps asks for it.

    Args:
        drawn: images that the training draws.
        holds: images that the memory of a process holds.
        processes: that the batch is divided among.
    """
    base = cfg.SOLVER.IMS_PER_BATCH
    parts = processes * cfg.SOLVER.ACCUMULATE
    of_backbone = cfg.MODEL.TIMM.NORM if is_timm(cfg) else cfg.MODEL.RESNETS.NORM
    norms = {of_backbone, cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM}
    least = max(parts * (_NORM_BATCH if "BN" in norms else 1), 2)  # norms see a part at a time
    batch, why = max(base, least), "as in the base"
    while batch > least and drawn / batch < _ITERATIONS:
        batch, why = batch // 2, f"smaller than the base's {base} for more steps of the optimizer"
    batch = max(batch, least)
    if batch > holds * parts:
        batch = max(holds, 1) * parts
        why = f"the memory holds {max(holds, 1)} images at a time (measured)"
    return max(batch // parts, 1) * parts, why


def decide_batch(recipe: Recipe, plan: Plan, cost: StepCost) -> None:
    """The batch that the machine can hold."""
    used = cost.memory_bytes / cost.images  # more than an image's: the model is in it
    holds = max(int(_MEMORY * cost.total_bytes / used), cost.images)
    holds = 1 << int(math.log2(holds))
    batch, why = batch_size(recipe.cfg, plan.drawn, holds, cost.processes)
    recipe.set(
        "SOLVER.IMS_PER_BATCH",
        batch,
        f"{why}; a step of {cost.images} took {cost.memory_bytes / 2**30:.2f} of "
        f"{cost.total_bytes / 2**30:.1f} GiB on {cost.device}",
    )
    if recipe.cfg.SOLVER.REFERENCE_WORLD_SIZE:
        recipe.set(
            "SOLVER.REFERENCE_WORLD_SIZE",
            cost.processes,
            "the base was scaled to so many processes, and so are the values here; with others, a "
            "training scales them again",
        )


def decide_rate(recipe: Recipe, base_rate: float, base_batch: int) -> None:
    """The learning rate for the batch, by the linear scaling rule."""
    batch = recipe.cfg.SOLVER.IMS_PER_BATCH
    rate = base_rate * batch / base_batch
    why = (
        f"the base's {base_rate:g} for {base_batch} images, scaled linearly to {batch} "
        "(arXiv:1706.02677)"
    )
    if from_scratch(recipe) and base_rate / base_batch <= 2 * _PAPER_RATE / _PAPER_BATCH:
        rate *= _SCRATCH_RATE
        why += (
            f", times {_SCRATCH_RATE}: random weights with norms that are trained take larger "
            "steps (arXiv:1810.08425)"
        )
    recipe.set("SOLVER.BASE_LR", float(f"{rate:.4g}"), why)


def decide_schedule(recipe: Recipe, facts: Facts, plan: Plan, seconds: float, device: str) -> None:
    """Iterations, steps and warm-up."""
    batch = recipe.cfg.SOLVER.IMS_PER_BATCH
    last = max(1, round(plan.drawn / batch))
    epochs = last * batch / facts.images
    full = drawn_images(facts.images, from_scratch(recipe)) / facts.images
    text = f"{_number(epochs)} epochs of {facts.images:,} images. "
    if plan.is_cut:
        text += f"--hours holds no more; without it there would be {_number(full)} epochs"
        if epochs < full / 4:
            recipe.warn(
                f"--hours holds {_number(epochs)} epochs; the rule for a set of this size asks for "
                f"{_number(full)}"
            )
    else:
        text += "The paper's 12 of 118,287, and more for a smaller set: by the square root of " + (
            f"its size, and {_SCRATCH_LENGTH} times for random weights (arXiv:1811.08883)"
            if from_scratch(recipe)
            else "its size"
        )
    recipe.set("SOLVER.MAX_ITER", last, text)
    last = recipe.cfg.SOLVER.MAX_ITER
    total = last * recipe.cfg.SOLVER.IMS_PER_BATCH * seconds
    recipe.title.append(
        f"The training takes about {duration(total)} on {device}, by a step that was timed, "
        "without evaluations."
    )
    steps = [round(last * 2 / 3), round(last * 8 / 9)]
    enough = steps[0] < steps[1] < last
    recipe.set(
        "SOLVER.STEPS",
        tuple(steps) if enough else (),
        "the learning rate drops at 2/3 and 8/9, as in the paper"
        if enough
        else "too few iterations for a drop of the learning rate",
    )
    warm_up = min(_PAPER_WARM_UP, int(last * _WARM_UP))
    recipe.set(
        "SOLVER.WARMUP_ITERS",
        warm_up,
        f"the paper's configs have {_PAPER_WARM_UP} of 90,000; a twentieth of the iterations at "
        "most",
    )


def decide_evaluation(recipe: Recipe, plan: Plan) -> None:
    """When AP is measured and a checkpoint written."""
    last = recipe.cfg.SOLVER.MAX_ITER
    if plan.evaluations > 1:
        period = max(1, -(-last // plan.evaluations))
        why = f"{plan.evaluations} times, which takes about a tenth of the time or less"
    else:
        period = 0
        why = "at the end only: more would take more than a tenth of the time"
        if not plan.evaluations:
            why = "there is no val set"
    recipe.set("TEST.EVAL_PERIOD", period, why)
    recipe.set(
        "SOLVER.CHECKPOINT_PERIOD",
        period or max(1, -(-last // _EVALUATIONS)),
        "at each evaluation" if period else "a tenth of the training, which is lost at most",
    )


def decide_workers(
    recipe: Recipe, seconds: float, reading: float, cores: int, processes: int, on_gpu: bool
) -> None:
    """Processes that read images.

    Args:
        seconds: of training for an image.
        reading: seconds to read and resize an image.
        cores: of the machine.
        processes: that train.
        on_gpu: whether the cores have nothing else to do.
    """
    text = (
        f"reading an image takes {reading * 1000:,.0f} ms, training on it {seconds * 1000:,.0f} ms"
    )
    if not on_gpu and reading <= _READING * seconds:
        recipe.set("DATALOADER.NUM_WORKERS", 0, f"{text}: a process for it would only cost memory")
        return
    most = max(1, min(_MAX_WORKERS, cores // processes - (0 if on_gpu else 1)))
    workers = min(most, max(1, math.ceil(_MARGIN * reading / seconds)))
    recipe.set("DATALOADER.NUM_WORKERS", workers, f"{text}, by {cores} cores")


def duration(seconds: float) -> str:
    """ "40 seconds", "12 minutes", "3.5 hours", "4.2 days"."""
    for unit, length in (("days", 48 * 1800), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.0f} seconds"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2g}"
