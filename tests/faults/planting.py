"""A tiny dataset, a config and weights, in which one fault is planted.

Nothing here imports the package: the same faults are given to Detectron2's own trainer, see
detectron2_outcomes.py.
"""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

CLASSES = ("zero", "one", "two")
SIDE = 64

# Detectron2's keys only, so that both read it. A training of two iterations and its evaluation.
CONFIG = {
    "MODEL": {
        "META_ARCHITECTURE": "RetinaNet",
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 18,
            "RES2_OUT_CHANNELS": 64,
            "NORM": "FrozenBN",
            "OUT_FEATURES": ["res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
        "RETINANET": {"NUM_CLASSES": len(CLASSES), "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0},
    },
    "DATASETS": {"TRAIN": ["fault_train"], "TEST": ["fault_val"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "INPUT": {"MIN_SIZE_TRAIN": [SIDE], "MIN_SIZE_TEST": SIDE, "RANDOM_FLIP": "none"},
    "SOLVER": {"IMS_PER_BATCH": 2, "BASE_LR": 0.01, "MAX_ITER": 2, "STEPS": [], "WARMUP_ITERS": 0},
    "SEED": 1,
    "VERSION": 2,
}


@dataclass
class World:
    """Files of a run. ``write`` puts them on the disk, with what a fault changed."""

    root: Path
    config: dict = field(default_factory=lambda: copy.deepcopy(CONFIG))
    coco: dict[str, dict] = field(default_factory=dict)  # of "train" and "val"
    json_bytes: dict[str, bytes] = field(default_factory=dict)  # instead of it
    yaml_bytes: bytes | None = None  # instead of the config
    overrides: list[str] = field(default_factory=list)
    eval_only: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        for split, number in (("train", 4), ("val", 2)):
            folder = self.root / split
            folder.mkdir(parents=True)
            images, annotations = [], []
            for i in range(1, number + 1):
                pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                for k in range(2):
                    x, y, w, h = (
                        int(v) for v in (*rng.integers(0, 20, 2), *rng.integers(20, 40, 2))
                    )
                    cv2.rectangle(pixels, (x, y), (x + w, y + h), (40 * k, 200, 30), -1)
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": i,
                            "category_id": (i + k) % 3 + 1,
                            "bbox": [x, y, w, h],
                            "area": w * h,
                            "iscrowd": 0,
                        }
                    )
                suffix = "jpg" if i % 2 else "png"
                cv2.imwrite(str(folder / f"{i}.{suffix}"), pixels)
                images.append(
                    {"id": i, "file_name": f"{i}.{suffix}", "width": SIDE, "height": SIDE}
                )
            self.coco[split] = {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
            }

    @property
    def config_file(self) -> Path:
        return self.root / "config.yaml"

    @property
    def marker(self) -> Path:
        """Code in a file would make it."""
        return self.root / "the code has run"

    def json_file(self, split: str) -> Path:
        return self.root / f"{split}.json"

    def image(self, split: str = "train", suffix: str = "jpg") -> Path:
        return next((self.root / split).glob(f"*.{suffix}"))

    def write(self) -> None:
        self.config["OUTPUT_DIR"] = str(self.root / "output")
        for split, content in self.coco.items():
            data = self.json_bytes.get(split, json.dumps(content).encode())
            self.json_file(split).write_bytes(data)
        text = yaml.safe_dump(self.config).encode() if self.yaml_bytes is None else self.yaml_bytes
        self.config_file.write_bytes(text)

    def save_weights(self, content: object, name: str = "weights.pth") -> Path:
        """Write weights as torch.save or, for .pkl, pickle does; the config names them."""
        path = self.root / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        self.config["MODEL"]["WEIGHTS"] = str(path)
        return path


@dataclass(frozen=True)
class Fault:
    """What is planted, and what has to come of it.

    Args:
        section: of docs/reliability.md.
        what: as the page has it.
        plant: changes the world.
        outcome: "error" (one line, exit status 1), "warning" (and the run ends well) or "same"
            (the numbers of the run without the fault, to the bit).
        says: a regular expression that the line or the warning matches.
        needs_run: it is found while training or evaluating, not before: seconds.
    """

    section: str
    what: str
    plant: Callable[[World], None]
    outcome: str
    says: str = ""
    needs_run: bool = False

    @property
    def is_slow(self) -> bool:
        return self.needs_run or self.outcome != "error"
