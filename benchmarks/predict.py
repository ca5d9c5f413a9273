"""Images per second and peak memory of prediction, beside Detectron2's ``DefaultPredictor``.

    python -m benchmarks.predict
    python -m benchmarks.predict --case digits --rounds 5 --threads 1

Each run is a process of its own, because a peak of memory is a process's. The implementations take
turns; medians are printed. Both read the same files and have the same random weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from benchmarks.inputs import model_cfg
from retina_plugin import get_config_file
from retina_plugin.data import digits
from retina_plugin.engine import setup_cfg
from retina_plugin.predict import RetinaPredictor

__all__ = ["CASES", "IMPLEMENTATIONS", "main"]

CASES = {"digits": 500, "R50_800": 20}  # name -> images
IMPLEMENTATIONS = {"detectron2": 0, "ours": 1, "ours, batch 4": 4}  # name -> batch size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the implementation, in its process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(_work(args.case[0], args.worker, args.folder, args.threads)))
        return
    for case in args.case:
        with tempfile.TemporaryDirectory() as folder:
            _prepare(case, Path(folder))
            _report(case, Path(folder), args)


def _cfg(case: str) -> CfgNode:
    if case == "digits":
        cfg = setup_cfg(get_config_file("quick/digits_R18.yaml"))
    else:
        cfg = model_cfg(case, "cpu")
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _prepare(case: str, folder: Path) -> None:
    """The images and untrained weights: what is timed is reading, resizing and the network."""
    if case == "digits":
        digits.prepare()
        files = sorted((digits.dataset_root() / "train").iterdir())[: CASES[case]]
    else:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        files = [folder / f"{number}.jpg" for number in range(CASES[case])]
        for number, file in enumerate(files):
            cv2.imwrite(str(file), cv2.resize(photos[number % 2][..., ::-1], (640, 480)))
    (folder / "files.json").write_text(json.dumps([str(file) for file in files]))
    torch.manual_seed(0)
    model = build_model(_cfg(case))
    torch.save({"model": model.state_dict()}, folder / "weights.pth")


def _report(case: str, folder: Path, args: argparse.Namespace) -> None:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPLEMENTATIONS}
    options = ["--case", case, "--folder", str(folder), "--threads", str(args.threads)]
    for _ in range(args.rounds):
        for name in IMPLEMENTATIONS:
            command = [sys.executable, "-m", "benchmarks.predict", "--worker", name, *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{case}, {CASES[case]} images, {args.threads} threads, {args.rounds} rounds", flush=True)
    for name, done_runs in runs.items():
        speed = statistics.median(x["images_per_second"] for x in done_runs)
        peak = statistics.median(x["peak_mib"] for x in done_runs)
        print(f"  {name:14} {speed:8.2f} images/s {peak:8.0f} MiB peak RSS", flush=True)


def _work(case: str, name: str, folder: Path, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    files = json.loads((folder / "files.json").read_text())
    cfg = _cfg(case)
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    batch_size = IMPLEMENTATIONS[name]
    if batch_size:
        predictor = RetinaPredictor.load(cfg, batch_size=batch_size)
        start = time.perf_counter()
        number = sum(1 for _ in predictor.stream(files))
    else:
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        # keys of ours that change the backbone are in the config, so the network is the same
        default = DefaultPredictor(cfg)
        start = time.perf_counter()
        number = sum(1 for file in files if default(cv2.imread(file)))
    seconds = time.perf_counter() - start
    assert number == len(files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
    return {"images_per_second": number / seconds, "peak_mib": peak}


if __name__ == "__main__":
    main()
