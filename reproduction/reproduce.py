"""Train and evaluate rows of the paper's tables, and compare their AP with the paper's.

    python -m reproduction.reproduce 1b --scale mini --rows "gamma=2" --seeds 1
    python -m reproduction.reproduce all --scale paper --dry-run

Each run is a process of ``train_net.py``. Its result goes into the ledger, docs/ledger.json and
docs/ledger.md. A run that is in the ledger is not run again; an interrupted one resumes from its
last checkpoint. At the scale "mini", a row's loss, sampler and anchors are tried on a small model
and the embedded digits (reproduction/mini.yaml).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from reproduction.intervals import resampled_ap
from reproduction.ledger import LEDGER, Ledger, summary
from reproduction.paper import METRICS, checkout
from reproduction.plan import Run, plan, select_rows
from retina_plugin.data import register_datasets
from retina_plugin.engine import check_weights, setup_cfg
from retina_plugin.engine.report import read_metrics
from retina_plugin.errors import ConfigError

_ATTEMPT = "##### "  # a run's console.txt has this line before the output of each process


def start(run: Run, output: Path, scale: str, slot: int, jobs: int) -> None:
    """Start the run's process. It resumes from the run's last checkpoint if there is one.

    Args:
        run: what to train.
        output: the run's folder is ``output/<scale>/<key>``.
        scale: "paper" runs use all GPUs, "mini" runs one each.
        slot: 0 to ``jobs`` - 1, different for runs at the same time: chooses the GPU.
        jobs: runs at the same time: they share the CPU's cores.
    """
    run.folder = output / scale / run.key
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(checkout() / "train_net.py"), "--config-file", str(run.config)]
    env = dict(os.environ)
    gpus = torch.cuda.device_count()
    if scale == "mini":
        command += ["--num-gpus", "1" if gpus else "0"]
        if gpus:
            visible = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        # more threads than cores would slow every run down
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    command += ["--resume", *run.opts, "OUTPUT_DIR", str(run.folder)]
    run.started = time.monotonic()
    with (run.folder / "commits.txt").open("a") as commits:  # a resumed run has several
        commits.write(f"{commit()}\n")
    with (run.folder / "console.txt").open("a") as console:
        console.write(f"{_ATTEMPT}{' '.join(command)}\n")
        console.flush()
        run.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=env,
            cwd=checkout(),
        )


def outcome(run: Run) -> dict[str, Any] | None:
    """The result of a run that has ended; None if it failed.

    A training that diverges is a result: it has "diverged_at", the iteration, instead of "AP". The
    other entries are its rows, its overrides ("set": those of ``--set``), the commits that trained
    it, its time ("seconds"), the first, largest and last logged classification loss, and AP on the
    resamples of :mod:`reproduction.intervals`.
    """
    assert run.process is not None
    console = (run.folder / "console.txt").read_text(errors="replace").split(_ATTEMPT)[-1]
    commits = dict.fromkeys((run.folder / "commits.txt").read_text().split())
    result: dict[str, Any] = {"rows": run.rows, "opts": run.opts, "commit": " ".join(commits)}
    if run.extra:
        result["set"] = run.extra
    series = read_metrics(run.folder / "metrics.json") if run.iteration() else {}
    # the log covers the whole training; this process may have resumed it
    times = [seconds for _, seconds in series.get("time", [])]
    result["seconds"] = round(
        sum(times) / len(times) * run.max_iter if times else time.monotonic() - run.started
    )
    if "loss_cls" in series:
        losses = [loss for _, loss in series["loss_cls"]]
        # the largest shows a loss that blew up but stayed finite
        result |= {"early_loss": losses[0], "largest_loss": max(losses), "final_loss": losses[-1]}
    if run.process.returncode != 0:  # a run may also skip such a step, and end well
        diverged = re.search(r"not finite at iteration=(\d+)", console)
        return {**result, "diverged_at": int(diverged[1])} if diverged else None
    if "bbox/AP" not in series:
        return None
    metrics = {name: series[f"bbox/{name}"][-1][1] for name in METRICS if f"bbox/{name}" in series}
    if math.isnan(metrics["AP"]):  # Detectron2 logs NaN if there is no detection
        metrics = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    # NaN is also the AP of sizes that no object has
    metrics = {name: ap for name, ap in metrics.items() if not math.isnan(ap)}
    return {**result, **metrics, "resampled_AP": _resampled(run)}


def _resampled(run: Run) -> list[float]:
    """AP of a run on the resamples of its test images, in percent."""
    cfg = setup_cfg(str(run.config), run.opts)
    register_datasets(cfg.DATASETS.TEST)
    dataset = cfg.DATASETS.TEST[0]
    annotations = checkout() / MetadataCatalog.get(dataset).json_file  # relative to where it ran
    found = resampled_ap(annotations, json.loads(predictions(run.folder, dataset).read_text()))
    return [round(float(x), 2) for x in found]


def predictions(folder: Path, dataset: str) -> Path:
    """The file of a run's detections, in COCO's result format."""
    return folder / "inference" / dataset / "coco_instances_results.json"


def commit() -> str:
    """The checkout's commit, with "+" if files that a run depends on were changed since."""
    git = ["git", "-C", str(checkout())]
    status = ["status", "--porcelain", "retina_plugin", "reproduction", "configs", "train_net.py"]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, *status], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def execute(runs: Sequence[Run], scale: str, jobs: int, output: Path, ledger: Ledger) -> list[Run]:
    """Train ``jobs`` runs at a time and record each new result; return the runs that failed.

    Raises:
        ConfigError: the weights that they start from are not there.
        ModuleNotFoundError: a package that makes these weights is not installed.
    """
    if not runs:
        return []
    # download or train the weights once, not in every run
    check_weights(setup_cfg(str(runs[0].config), runs[0].opts))
    jobs = min(jobs, len(runs))
    waiting = list(runs)
    # A kill ends as Ctrl-C does: the runs save what they have and end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    active: list[Run] = []
    failed: list[Run] = []
    free = list(range(jobs))
    slots: dict[str, int] = {}
    total = sum(run.max_iter for run in runs)
    ended = 0
    with tqdm(total=total, unit="it", disable=not sys.stdout.isatty(), smoothing=0.02) as bar:
        try:
            while waiting or active:
                while waiting and free:
                    run = waiting.pop(0)
                    slots[run.key] = free.pop(0)
                    start(run, output, scale, slots[run.key], jobs)
                    active.append(run)
                    tqdm.write(f"started  {run.key}  {', '.join(run.rows)}")
                time.sleep(1)
                for run in [r for r in active if r.process and r.process.poll() is not None]:
                    active.remove(run)
                    free.append(slots[run.key])
                    ended += run.max_iter
                    result = outcome(run)
                    if result is None:
                        failed.append(run)
                        tqdm.write(f"FAILED   {run.key}  see {run.folder / 'console.txt'}")
                    else:
                        if run.key not in ledger.runs(scale):
                            ledger.record(scale, run.key, result)
                        tqdm.write(f"finished {run.key}  {summary(result)}")
                bar.n = ended + sum(run.iteration() for run in active)
                bar.set_postfix_str(f"{len(active)} running, {len(waiting)} waiting")
        finally:
            for run in active:  # after an interruption; the next call resumes them
                if run.process is not None:
                    run.process.terminate()
                    run.process.wait()
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="5.1, 1a ... 1e, 2, 3 or all")
    parser.add_argument("--scale", choices=("paper", "mini"), default="paper")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 1 to N of each row (default 2)")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time (default: paper 1, on all GPUs; mini one per GPU, else per CPU core)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"))
    parser.add_argument(
        "--ledger",
        type=Path,
        default=LEDGER,
        help="JSON file of the results, with the tables beside it as .md (default: docs/)",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="more overrides")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start none")
    args = parser.parse_args(argv)
    try:
        runs = plan(select_rows(args.tables, args.rows), args.scale, args.seeds, args.set)
        ledger = Ledger(args.ledger)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    todo = [run for run in runs if run.key not in ledger.runs(args.scale)]
    jobs = args.jobs or default_jobs(args.scale)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} in the ledger, {jobs} at a time")
    for run in todo if args.dry_run else []:
        print(f"{run.key}  {run.max_iter} it  {', '.join(run.rows)}\n    {' '.join(run.opts)}")
    if args.dry_run:
        return 0
    try:
        failed = execute(todo, args.scale, jobs, args.output.resolve(), ledger)
    except (ConfigError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    for run in runs:
        if run.key in ledger.runs(args.scale):
            ledger.add_rows(args.scale, run.key, run.rows)
            print(f"{', '.join(run.rows)}: {summary(ledger.runs(args.scale)[run.key])}")
    print(f"ledger: {ledger.path.with_suffix('.md')}")
    return 1 if failed else 0


def default_jobs(scale: str) -> int:
    """One run at the paper's scale, which uses all GPUs; else one run per GPU or CPU core."""
    if scale == "paper":
        return 1
    return torch.cuda.device_count() or os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
