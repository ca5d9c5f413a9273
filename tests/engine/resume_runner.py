"""Runs trainings that are killed, each in a process of its own, for ``test_resume.py``.

Importing takes longer than such a training. So this program imports once, and forks for each
training that it reads from its standard input (a JSON object a line).
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter
from PIL import Image

from retina_plugin.engine import Trainer, hooks, setup_cfg
from retina_plugin.engine.writers import Writers
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import coco

REPO = Path(__file__).resolve().parents[2]
SHAPES = ((64, 48), (48, 64), (64, 64))  # (width, height)
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.FPN.NORM", "GN"),
    *("MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    # Flips and sizes are drawn for each image.
    *("INPUT.MIN_SIZE_TRAIN", "(48,64)", "INPUT.RANDOM_FLIP", "horizontal"),
    *("INPUT.MIN_SIZE_TEST", 48, "DATASETS.TRAIN", "('mixed_train',)"),
    *("DATASETS.TEST", "('mixed_val',)", "DATALOADER.ASPECT_RATIO_GROUPING", True),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", 7),
    *("SOLVER.STEPS", "(5,)", "SOLVER.WARMUP_ITERS", 3, "SOLVER.CHECKPOINT_PERIOD", 2),
    *("TEST.EVAL_PERIOD", 3, "SEED", 1),
]


def write_dataset(root):
    """Images of three shapes with a few rectangles, one colour for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 4)):
        images, annotations = [], []
        for number in range(count):
            width, height = SHAPES[number % 3]
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            for _ in range(2):
                category = int(rng.integers(3))
                w, h = (int(x) for x in rng.integers(16, 32, 2))
                x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
                pixels[y : y + h, x : x + w, category] = 220
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category + 1}
                    | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                )
            name = f"{split}{number}.png"
            Image.fromarray(pixels).save(root / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        categories = [{"id": i + 1, "name": f"class{i}"} for i in range(3)]
        text = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(text))
        register_coco_instances(f"mixed_{split}", {}, str(root / f"{split}.json"), str(root))


class Moments:
    """Numbers the moments of a training, and sends a signal to its process at one of them."""

    def __init__(self, at, number, group, log):
        self.at, self.number, self.group, self.log = at, number, group, log

    def __call__(self, name):
        count = len(self.log)
        self.log.append(name)
        if count == self.at:
            (os.killpg if self.group else os.kill)(os.getpid(), self.number)


class SlowFile:
    """A file in which every fourth megabyte is a moment."""

    def __init__(self, file, moment):
        self.file, self.moment, self.written, self.next = file, moment, 0, 0

    def write(self, data):
        self.written += self.file.write(data)
        if self.written > self.next:
            self.file.flush()
            self.moment(f"{self.next >> 20} MB written")
            self.next += 1 << 22
        return len(data)

    def flush(self):
        self.file.flush()


def plant(moment):
    """Call ``moment`` wherever a kill may hurt."""
    save, replace, write = torch.save, os.replace, JSONWriter.write
    process = coco.FastCOCOEvaluator.process

    def slow_save(obj, file, *args, **kwargs):
        moment("save")
        save(obj, SlowFile(file, moment), *args, **kwargs)
        moment("saved")

    def slow_replace(source, target, *args, **kwargs):
        moment(f"before rename to {Path(target).name}")
        replace(source, target, *args, **kwargs)
        moment(f"after rename to {Path(target).name}")

    def slow_write(self):
        moment("before metrics.json")
        write(self)
        moment("after metrics.json")

    def slow_process(self, *args):
        moment("evaluation")
        process(self, *args)

    torch.save, os.replace, JSONWriter.write = slow_save, slow_replace, slow_write
    coco.FastCOCOEvaluator.process = slow_process


class Steps(HookBase):
    """Moments of an iteration; registered after all other hooks."""

    def __init__(self, moment):
        self.moment = moment

    def before_step(self):
        self.moment(f"iteration {self.trainer.iter}")

    def after_step(self):
        self.moment("after hooks")


def train(case, rank):
    torch.set_num_threads(1)
    log = []
    at = case["at"] if rank == case.get("at_rank", 0) else None
    moment = Moments(at, getattr(signal, case.get("signal", "SIGKILL")), "group" in case, log)
    plant(moment)
    hooks.Results._draw = lambda self, out: None  # takes longer than the training
    config = str(REPO / "configs" / "_base_" / "digits_R18.yaml")
    cfg = setup_cfg(config, [*OPTIONS, *case["options"], "OUTPUT_DIR", case["folder"]])
    for key, value in case.get("keys", {}).items():  # of samplers; not in Detectron2's defaults
        section, name = key.split(".")
        cfg[section][name] = value
    # As default_setup does. Where there is a checkpoint, nothing may depend on it.
    has_checkpoint = any(Path(case["folder"]).glob("model_0*.pth"))
    seed = cfg.SEED if cfg.SEED >= 0 else 77
    seed_all_rng(seed + rank + (1000 if has_checkpoint else 0))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=case["resume"])
    trainer.register_hooks([Steps(moment)])
    trainer.optimizer.register_step_post_hook(lambda *args: moment("optimizer"))
    for hook in trainer._hooks:
        if isinstance(hook, Writers):
            hook._period = 2
    trainer.train()
    if rank == 0 and case.get("moments"):
        Path(case["moments"]).write_text(json.dumps(log))


def run(case, rank):
    """The life of one process of a training; never returns."""
    status = 1
    try:
        output = os.open(f"{case['folder']}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setpgid(0, 0)
        if case["processes"] > 1:
            torch.distributed.init_process_group(
                "gloo", f"file://{case['store']}", rank=rank, world_size=case["processes"]
            )
            comm.create_local_process_group(case["processes"])
        train(case, rank)
        status = 0
    except SystemExit as end:
        status = end.code
    except ConfigError as error:
        print(f"error: {error}")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_case(case):
    """Fork the processes of a training; returns their exit codes."""
    case["store"] = tempfile.mktemp(dir=os.path.dirname(case["folder"]))
    pids = []
    for rank in range(case["processes"]):
        pid = os.fork()
        if pid == 0:
            run(case, rank)
        pids.append(pid)
    if case.get("seconds"):
        time.sleep(case["seconds"])
        os.kill(pids[0], signal.SIGKILL)
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        if pid not in pids:
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] < 0:  # killed: its machine is gone, with all of its processes
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder))
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
