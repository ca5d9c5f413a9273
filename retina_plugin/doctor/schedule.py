"""Learning rate, warm-up and schedule against batch and training set."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from .findings import Finding, Severity
from .values import check_values, is_number

__all__ = ["check_reference", "check_scaled", "check_schedule", "schedule_findings"]

# The paper's batch and learning rate (section 4.1, "Optimization"), to which the linear scaling
# rule (Goyal et al., arXiv:1706.02677) refers.
_BATCH, _RATE = 16, 0.01
_FAR = 3  # factor from the rule that is a warning for pretrained weights
_FAR_FROM_SCRATCH = 10  # the same for a training from scratch, which takes larger rates
_NEAR = 2  # factor that is not worth a word
_LONG_WARM_UP = 0.2  # share of a training


def check_schedule(cfg: CfgNode) -> Iterator[Finding]:
    """Keys of ``SOLVER`` that contradict each other."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        late = [step for step in solver.STEPS if step > solver.MAX_ITER]
        if late:
            yield Finding(
                Severity.WARNING,
                "SOLVER.STEPS",
                f"{late[0]} lies beyond SOLVER.MAX_ITER {solver.MAX_ITER}: the learning rate does "
                "not drop there",
                "scale SOLVER.STEPS with SOLVER.MAX_ITER",
            )
        if solver.MAX_ITER in solver.STEPS:
            yield _error(
                "SOLVER.STEPS",
                f"{solver.MAX_ITER} is SOLVER.MAX_ITER: the learning rate would drop after the end",
                "take it out",
            )
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        what = f"{solver.WARMUP_ITERS} is not below SOLVER.MAX_ITER {solver.MAX_ITER}: "
        # Detectron2 divides by the iterations that follow the warm-up.
        rescaled = solver.RESCALE_INTERVAL
        yield Finding(
            Severity.ERROR if rescaled else Severity.WARNING,
            "SOLVER.WARMUP_ITERS",
            f"{what}SOLVER.RESCALE_INTERVAL True needs iterations after it"
            if rescaled
            else f"{what}the learning rate never reaches SOLVER.BASE_LR",
            "shorten the warm-up",
        )
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and not (
        is_number(solver.BASE_LR_END) and 0 <= solver.BASE_LR_END <= solver.BASE_LR
    ):
        yield _error(
            "SOLVER.BASE_LR_END",
            f"must be a number from 0 to SOLVER.BASE_LR {solver.BASE_LR}, got {solver.BASE_LR_END}",
        )
    yield from check_reference(cfg)
    if solver.NESTEROV and solver.MOMENTUM == 0:
        yield _error("SOLVER.NESTEROV", "needs momentum", "set SOLVER.MOMENTUM above 0")


def check_reference(cfg: CfgNode) -> Iterator[Finding]:
    """``SOLVER.REFERENCE_WORLD_SIZE`` processes share a batch evenly, or it cannot be scaled."""
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if processes and batch % processes:
        yield _error(
            "SOLVER.REFERENCE_WORLD_SIZE",
            f"{processes} processes cannot share SOLVER.IMS_PER_BATCH {batch} evenly",
            "set it to the number of GPUs that the batch is meant for; 0 scales nothing",
        )


def check_scaled(cfg: CfgNode, scaled: CfgNode) -> Iterator[Finding]:
    """What ``SOLVER.REFERENCE_WORLD_SIZE`` makes of the schedule, and whether that is possible.

    Args:
        cfg: a checked config.
        scaled: what Detectron2's ``auto_scale_workers`` returned for it.
    """
    if scaled is cfg:
        return
    key, solver = "SOLVER.REFERENCE_WORLD_SIZE", scaled.SOLVER
    number = f"{solver.REFERENCE_WORLD_SIZE} process{'es' * (solver.REFERENCE_WORLD_SIZE > 1)}"
    yield Finding(
        Severity.NOTE,
        key,
        f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}, but here is {number}, with "
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, BASE_LR {solver.BASE_LR:.4g}, MAX_ITER "
        f"{solver.MAX_ITER}, STEPS {solver.STEPS} and WARMUP_ITERS {solver.WARMUP_ITERS}",
    )
    for finding in (*check_values(scaled, eval_only=False), *check_schedule(scaled)):
        if finding.severity is Severity.ERROR and finding.where.startswith("SOLVER."):
            yield _error(
                finding.where,
                f"{finding.what} ({key} {cfg.SOLVER.REFERENCE_WORLD_SIZE} scaled it to {number})",
                f"change it, or set {key} 0 and the schedule of {number}",
            )


def _error(where: str, what: str, fix: str = "") -> Finding:
    return Finding(Severity.ERROR, where, what, fix)


def schedule_findings(cfg: CfgNode, num_images: int) -> Iterator[Finding]:
    """Values of ``SOLVER`` that are possible, but perhaps not meant.

    Args:
        cfg: the config.
        num_images: images that training draws from.
    """
    yield from _rate(cfg)
    yield from _steps(cfg)
    yield from _warm_up(cfg)
    if num_images:
        yield from _epochs(cfg, num_images)


def _rate(cfg: CfgNode) -> Iterator[Finding]:
    solver = cfg.SOLVER
    rule = _RATE * solver.IMS_PER_BATCH / _BATCH
    factor = solver.BASE_LR / rule
    if 1 / _NEAR <= factor <= _NEAR:
        return
    limit = _FAR if cfg.MODEL.WEIGHTS else _FAR_FROM_SCRATCH
    far = not 1 / limit <= factor <= limit
    times = f"{factor:.3g} times" if factor > 1 else f"1/{1 / factor:.3g} of"
    yield Finding(
        Severity.WARNING if far else Severity.NOTE,
        "SOLVER.BASE_LR",
        f"{solver.BASE_LR:g} with SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is {times} the "
        f"{rule:.4g} that the linear scaling rule gives from the paper's {_RATE:g} for {_BATCH} "
        "images",
        f"set SOLVER.BASE_LR {rule:.4g}, unless the loss says otherwise",
    )


def _steps(cfg: CfgNode) -> Iterator[Finding]:
    last = cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and not cfg.SOLVER.STEPS:
        yield Finding(
            Severity.NOTE,
            "SOLVER.STEPS",
            "is empty: the learning rate never drops",
            f"the paper's are 2/3 and 8/9 of SOLVER.MAX_ITER: ({round(last * 2 / 3)}, "
            f"{round(last * 8 / 9)})",
        )


def _warm_up(cfg: CfgNode) -> Iterator[Finding]:
    solver = cfg.SOLVER
    warm_up, last = solver.WARMUP_ITERS, solver.MAX_ITER
    key = "SOLVER.WARMUP_ITERS"
    steps = [step for step in solver.STEPS if step < last]
    if warm_up >= last:
        return  # check_config says it
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and steps and warm_up > steps[0]:
        yield Finding(
            Severity.WARNING,
            key,
            f"{warm_up} iterations, but the learning rate drops at {steps[0]} (SOLVER.STEPS): it "
            "never reaches SOLVER.BASE_LR",
            f"set it to {max(1, last // 20)}",
        )
    elif warm_up > _LONG_WARM_UP * last:
        yield Finding(
            Severity.NOTE,
            key,
            f"the warm-up takes {warm_up} of {last} iterations (SOLVER.MAX_ITER)",
            f"{max(1, last // 20)} are usually enough",
        )


def _epochs(cfg: CfgNode, num_images: int) -> Iterator[Finding]:
    drawn = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    epochs = drawn / num_images
    text = (
        f"{cfg.SOLVER.MAX_ITER:,} iterations of {cfg.SOLVER.IMS_PER_BATCH} images are "
        f"{f'{epochs:,.0f}' if epochs >= 100 else f'{epochs:.3g}'} epochs of {num_images:,} images"
    )
    if drawn < num_images and cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        yield Finding(
            Severity.WARNING,
            "SOLVER.MAX_ITER",
            f"{text}: {num_images - drawn:,} images are never seen",
            f"{-(-num_images // cfg.SOLVER.IMS_PER_BATCH):,} iterations are an epoch",
        )
    else:
        yield Finding(Severity.NOTE, "SOLVER.MAX_ITER", text)
