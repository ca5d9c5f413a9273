"""What Detectron2 does on the planted faults: python -m tests.faults.detectron2_outcomes

Trains its RetinaNet with ``DefaultTrainer`` and ``COCOEvaluator`` on the same files and the same
YAML, each in a process of its own, and writes detectron2_outcomes.json. Minutes. It runs the code
that hostile files hold (which makes a folder beside them).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.env import seed_all_rng

from tests.faults.faults import FAULTS, _state_dict
from tests.faults.planting import World

RECORD = Path(__file__).with_name("detectron2_outcomes.json")
SECONDS = 120  # then it counts as a hang


class Trainer(DefaultTrainer):
    """As in Detectron2's tools/train_net.py."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def train_or_evaluate(world: World) -> dict[str, object]:
    """The losses, AP and detections, without times."""
    cfg = get_cfg()
    cfg.merge_from_file(str(world.config_file))
    cfg.merge_from_list(world.overrides)
    if cfg.OUTPUT_DIR == "./output":
        cfg.OUTPUT_DIR = str(world.root / "output")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(cfg.SEED)  # as default_setup does
    if world.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=False
        )
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        results = trainer.train()
    found: dict[str, object] = {f"AP {k}": v for k, v in (results or {}).get("bbox", {}).items()}
    for path in sorted(Path(cfg.OUTPUT_DIR).rglob("coco_instances_results.json")):
        found[path.name] = json.loads(path.read_text())
    metrics = Path(cfg.OUTPUT_DIR, "metrics.json")
    if metrics.is_file():
        for line in metrics.read_text().splitlines():
            found |= {k: v for k, v in json.loads(line).items() if "loss" in k}
    return found


def run(world: World, file: str) -> None:
    """In a process of its own: what came of it goes to the file."""
    torch.set_num_threads(1)
    with open(file, "w") as written, contextlib.redirect_stdout(io.StringIO()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warned: list[str] = []
        for name in ("detectron2", "fvcore"):
            handler = logging.Handler(logging.WARNING)
            handler.emit = lambda record: warned.append(record.getMessage())
            logging.getLogger(name).addHandler(handler)
        try:
            world.write()
            for split in ("train", "val"):
                register_coco_instances(
                    f"fault_{split}", {}, str(world.json_file(split)), str(world.root / split)
                )
            json.dump({"results": train_or_evaluate(world), "warned": warned}, written)
        except BaseException as error:
            last = traceback.format_exception_only(error)[-1].strip().splitlines()
            json.dump({"raised": last[-1] if last else type(error).__name__}, written)


def outcome(plant, eval_only: bool = False) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder, "world"), eval_only=eval_only)
        plant(world)
        file = os.path.join(folder, "outcome.json")
        process = multiprocessing.get_context("fork").Process(target=run, args=(world, file))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return {"raised": f"no end after {SECONDS} s"}
        found = json.loads(Path(file).read_text() or '{"raised": "the process died"}')
        found["ran_code"] = world.marker.exists()
        for key in ("raised", "warned"):
            text = str((found.get("warned") or [""])[0] if key == "warned" else found.get(key, ""))
            found[key] = re.sub(r"\s+", " ", text.replace(str(world.root), "FOLDER"))[:160].strip()
        return found


def whole_weights(world: World) -> None:
    world.save_weights({"model": _state_dict(world)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of a fault's name; keeps the others")
    only = parser.parse_args().only
    whole = {
        False: outcome(lambda world: None)["results"],
        True: outcome(whole_weights, eval_only=True)["results"],
    }
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    faults = record.get("faults", {}) if only else {}
    for fault in FAULTS:
        if only not in fault.what:
            continue
        found = outcome(fault.plant)
        text = f"raises `{found['raised']}`" if found["raised"] else "ends well"
        if "results" in found:
            same = found["results"] == whole[fault.section.endswith("--eval-only")]
            text += ", the same numbers" if same else ", other numbers"
            if not same:
                text += f", warns `{found['warned']}`" if found["warned"] else ", not a word"
        if found.get("ran_code"):
            text = f"**runs the code**, then {text}"
        faults[f"{fault.section}: {fault.what}"] = text
        print(f"{fault.section}: {fault.what}: {text}", file=sys.stderr, flush=True)
    names = [f"{fault.section}: {fault.what}" for fault in FAULTS]
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "fvcore", "pycocotools")},
        "detectron2": __import__("detectron2").__version__,
        "faults": {name: faults[name] for name in names if name in faults},
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
