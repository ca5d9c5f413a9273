"""Time each stage of RetinaNet here, in Detectron2 and in torchvision, side by side.

    python -m benchmarks
    python -m benchmarks --stage loss matching --device cuda

All contenders of a stage run in this process in turns, round after round, once their results were
compared; each contest says how, and who is not compared. Times are of this process's CPU on one
thread; on an accelerator, or with more threads, of the wall clock. With two rounds or more, a run
of less than 20 ms is repeated within a round. Ratios are medians of the rounds' ratios. Writes a
JSON file and pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate

from benchmarks import cases, loss, models, pipeline
from benchmarks.cases import PEERS, Contest
from benchmarks.pipeline import detectron2_is_compiled
from reproduction.paper import load_paper
from retina_plugin.errors import ConfigError

__all__ = ["Result", "compare", "draw", "main"]

STAGES: dict[str, Callable[[str], Iterator[Contest]]] = {
    "loss": loss.loss,
    "matching": cases.matching,
    "postprocess": cases.postprocess,
    "mapper": pipeline.mapper,
    "evaluate": pipeline.evaluate,
    "train-step": models.train_step,
    "inference": models.inference,
}

CLOCKS = ("CPU time of the process", "wall clock")

# Seconds that a round takes at least: what is shorter is repeated, so that its time is its own and
# not that of the caches as the one before left them.
_SHORTEST = 0.02

# glibc gives large blocks back at once and the next tensor pays for every page again. That flatters
# whoever allocates less, which is ours: the heap is kept unless --default-malloc.
_WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


@dataclass
class Result:
    """One contender of one contest."""

    stage: str
    contest: str
    contender: str
    milliseconds: float  # median, of the clock that the machine's part names
    wall_milliseconds: float
    ratio: float | None  # times faster than the first contender, median of the rounds
    ratio_low: float | None
    ratio_high: float | None
    peak_bytes: int | None  # most that torch had allocated beyond what was there before
    rounds: int
    agreement: str


def compare(contest: Contest, rounds: int, device: str) -> list[Result]:
    """Run a contest: results first, then times and memory.

    Args:
        contest: see :class:`Contest`; ``contest.rounds`` bounds ``rounds``.
        rounds: after one of warm-up, which tells how often a short run is repeated in a round; a
            single round has none, for everything has run by then.
        device: "cpu" or "cuda".

    Raises:
        AssertionError: the contenders' results differ by more than the contest allows.
    """
    agreement = contest.check(contest.results())
    gc.collect()
    peaks = {
        name: peak_memory(contest.ready(name), device) if contest.memory else None
        for name in contest.contenders
    }
    rounds = min(rounds, contest.rounds)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contest.contenders}
    runs = dict.fromkeys(contest.contenders, 1)
    warm_up = rounds > 1
    for number in range(rounds + warm_up):
        for name in contest.contenders:
            took = stopwatch(contest.ready(name), device, runs[name])
            if number or not warm_up:
                times[name].append(took)
            elif name not in contest.prepare:
                runs[name] = math.ceil(_SHORTEST / max(took[1], 1e-6))
    which = CLOCKS.index(clock(device))
    base = next(iter(times.values()))
    results = []
    for name, taken in times.items():
        ratios = [b[which] / t[which] for b, t in zip(base, taken)] if taken is not base else []
        results.append(
            Result(
                contest.stage,
                contest.name,
                name,
                1e3 * statistics.median(t[which] for t in taken),
                1e3 * statistics.median(t[1] for t in taken),
                statistics.median(ratios) if ratios else None,
                min(ratios, default=None),
                max(ratios, default=None),
                peaks[name],
                rounds,
                agreement,
            )
        )
    return results


def clock(device: str) -> str:
    """Whose time is compared: other programs do not touch the CPU's, but threads add up in it."""
    return CLOCKS[0] if device == "cpu" and torch.get_num_threads() == 1 else CLOCKS[1]


def stopwatch(run: Callable[[], Any], device: str, times: int = 1) -> tuple[float, float]:
    """Seconds of this process's CPU and of the wall clock that a run takes."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """The most bytes that torch's allocator held during ``run``, beyond those before."""
    if device == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(results: Iterable[Result]) -> str:
    """A line for each contender."""
    rows, last = [], None
    for r in results:
        title = f"{r.stage}: {r.contest}" if r.contest != last else ""
        last = r.contest
        spread = f"{r.ratio:.2f}x ({r.ratio_low:.2f} to {r.ratio_high:.2f})" if r.ratio else ""
        memory = "" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f} MB"
        rows.append([title, r.contender, f"{r.milliseconds:.1f}", spread, memory])
    headers = ["stage", "who", "ms", "times as fast", "peak memory"]
    return tabulate(rows, headers, disable_numparse=True)


def draw(results: list[Result], title: str, path: Path) -> None:
    """Bars of the ratios on a logarithmic axis, a group for each contest."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed, no state stays

    shown = [r for r in results if r.ratio is not None and r.contender != "limit"]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r.stage}, {r.contest}: {r.contender}" for r in shown]
    colors = ["tab:gray" if r.contender.startswith(PEERS) else "tab:blue" for r in shown]
    axes.barh(range(len(shown)), [r.ratio or 0 for r in shown], color=colors, left=0)
    for y, r in enumerate(shown):
        axes.text(r.ratio or 0, y, f" {r.ratio:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=1.6 * max(r.ratio or 0 for r in shown))  # room for the number
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as Detectron2 (median of the rounds)")
    figure.suptitle(textwrap.fill(title, 110), fontsize=9)
    figure.savefig(path, dpi=120)


def draw_figure2(results: list[Result], machine_name: str, path: Path) -> None:
    """Figure 2's axes: the paper's AP over the time of an image, there and here."""
    from matplotlib.figure import Figure

    took = {r.contest: r.wall_milliseconds for r in results if r.stage == "inference"}
    rows = [row for row in load_paper()["1e"].rows if row.name in took]
    if not rows:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for depth, marker, offset in (("R50", "o", (4, -10)), ("R101", "s", (-22, 4))):
        of_depth = [row for row in rows if row.name.startswith(depth)]
        ap = [row.metrics["AP"] for row in of_depth]
        paper = [row.metrics["ms"] for row in of_depth]
        here = [took[row.name] for row in of_depth]
        axes.plot(paper, ap, marker=marker, color="tab:gray", label=f"{depth}, the paper's M40")
        axes.plot(here, ap, marker=marker, color="tab:blue", label=f"{depth}, {machine_name}")
        for x, y, row in zip(here, ap, of_depth):
            axes.annotate(
                row.name.split("-")[1],
                (x, y),
                fontsize=8,
                xytext=offset,
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.set_xlabel("ms an image")
    axes.set_ylabel("AP that the paper reports")
    axes.set_title("Speed side of Figure 2: times are measured, AP is the paper's", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the times depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "threads": threads,
        "clock": clock(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2's compiled parts": "yes" if detectron2_is_compiled() else "no",
        "malloc": "default" if "MALLOC_TRIM_THRESHOLD_" not in os.environ else "heap kept",
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__doc__ or "").split("\n\n")[0],
    )
    parser.add_argument("--stage", nargs="+", default=["all"], choices=["all", *STAGES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="after one of warm-up (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="let glibc give memory back to the system, as it does if nobody tells it not to",
    )
    parser.add_argument("--output", type=Path, default=Path("output", "benchmark"))
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    try:
        run(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    for option in ("rounds", "threads"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} {getattr(args, option)}: give 1 or more")
    torch.set_num_threads(args.threads)
    about = machine(args.device, args.threads)
    stages = [stage for stage in STAGES if stage in args.stage or "all" in args.stage]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.device}.json"
    results = [r for r in earlier(path, about) if r.stage not in stages]
    for stage in stages:
        for contest in STAGES[stage](args.device):
            done = compare(contest, args.rounds, args.device)
            results = sorted([*results, *done], key=lambda r: list(STAGES).index(r.stage))
            print(table(done), end="\n\n", flush=True)
            # after each, so that a long benchmark that is cut off has said something
            path.write_text(
                json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1)
            )
    title = ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in about.items())
    draw(results, title, path.with_suffix(".png"))
    draw_figure2(results, f"{about['device']}", path.with_name(f"{args.device}_figure2.png"))
    print(f"{title}\nwrote {path} and pictures beside it")


def earlier(path: Path, about: dict[str, Any]) -> list[Result]:
    """What a file has of the same machine and versions: stages that are not run again stay."""
    if not path.is_file():
        return []
    written = json.loads(path.read_text())
    return [Result(**r) for r in written["results"]] if written["machine"] == about else []


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What glibc, OpenMP, hotcoco's thread pool and the profiler read when a process starts."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(options.threads))
    heap = {} if options.default_malloc else _WARM_HEAP
    # the profiler, which counts memory, would report its starts and stops
    return {**threads, **heap, "KINETO_LOG_LEVEL": "99"}


if __name__ == "__main__":
    wanted = environment(arguments().parse_args())
    if sys.platform == "linux" and not wanted.items() <= os.environ.items():
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks", *sys.argv[1:]],
            {**os.environ, **wanted},
        )
    main()
