"""Time each stage of RetinaNet: ours beside Detectron2's and torchvision's.

    python -m benchmarks
    python -m benchmarks --stage loss matching --device cuda

All implementations of a case run in this process, in turns, after their results have been compared.
Times are CPU time of the process on one thread; with more threads, or on a GPU, wall clock. Writes
a JSON file and pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import evaluation, loss, mapper, matching, models, postprocess
from benchmarks.case import Case, run_case
from benchmarks.machine import describe_machine, keep_heap
from benchmarks.report import draw, draw_figure2, read_results, table, write_results
from retina_plugin.errors import ConfigError

__all__ = ["STAGES", "argument_parser", "main"]

# Name of the stage -> function of the device that yields the stage's cases.
STAGES: dict[str, Callable[[str], Iterator[Case]]] = {
    "loss": loss.loss,
    "matching": matching.matching,
    "postprocess": postprocess.postprocess,
    "mapper": mapper.mapper,
    "evaluate": evaluation.evaluate,
    "train-step": models.train_step,
    "inference": models.inference,
}


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    try:
        _run(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__doc__ or "").split("\n\n")[0],
    )
    parser.add_argument("--stage", nargs="+", default=["all"], choices=["all", *STAGES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="after one of warm-up (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="let glibc return freed memory to the system, as it does by default",
    )
    parser.add_argument("--output", type=Path, default=Path("output", "benchmark"))
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    for option in ("rounds", "threads"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} {getattr(args, option)}: give 1 or more")
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # hotcoco's threads, read at first use
    os.environ["KINETO_LOG_LEVEL"] = "99"  # otherwise the profiler logs each start and stop
    heap_kept = not args.default_malloc and keep_heap()
    machine = describe_machine(args.device, args.threads, heap_kept)
    stages = [stage for stage in STAGES if stage in args.stage or "all" in args.stage]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.device}.json"
    # results of the stages that are not run again stay in the file
    results = [r for r in read_results(path, machine) if r.stage not in stages]
    for stage in stages:
        for case in STAGES[stage](args.device):
            new = run_case(case, args.rounds, args.device)
            results = sorted([*results, *new], key=lambda r: list(STAGES).index(r.stage))
            print(table(new), end="\n\n", flush=True)
            write_results(path, machine, results)  # now: a run of all stages takes long
    title = ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in machine.items())
    draw(results, title, path.with_suffix(".png"))
    draw_figure2(results, str(machine["device"]), path.with_name(f"{args.device}_figure2.png"))
    print(f"{title}\nwrote {path} and pictures beside it")
