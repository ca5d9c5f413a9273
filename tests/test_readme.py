"""The README's examples run as they stand there."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from retina_plugin import add_retina_config
from retina_plugin.cli.train import main as cli
from retina_plugin.data import digits
from retina_plugin.engine import setup_cfg
from retina_plugin.losses import CLS_LOSS_REGISTRY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(language, containing):
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the checkout's configs beside the user's files."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_loss_trains(folder, tiny_cfg):
    (folder / "my_loss.py").write_text(block("python", "class SquaredCrossEntropy"))
    (folder / "squared.yaml").write_text(block("yaml", "SquaredCrossEntropy"))
    short = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "OUTPUT_DIR", str(folder / "out")]
    tiny = ["DATASETS.TRAIN", str(tiny_cfg.DATASETS.TRAIN), "DATASETS.TEST", "()"]
    cli(["--config-file", "squared.yaml", "--num-gpus", "0", *short, *tiny])
    assert "SquaredCrossEntropy" in CLS_LOSS_REGISTRY
    assert (folder / "out" / "model_final.pth").is_file()


def test_own_dataset_resolves(folder):
    (folder / "my_data.py").write_text(block("python", "register_coco_instances"))
    (folder / "cars.yaml").write_text(block("yaml", "cars_train"))
    cfg = setup_cfg("cars.yaml")
    assert cfg.DATASETS.TRAIN == ("cars_train",) and cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.SOLVER.MAX_ITER == 90000 and cfg.INPUT.MIN_SIZE_TRAIN == (600,)
    assert cfg.OUTPUT_DIR == "output/cars"


def test_every_added_key_is_in_the_table():
    plain, ours = get_cfg(), add_retina_config(get_cfg())

    def keys(cfg, prefix=""):
        for name, value in cfg.items():
            yield from (
                keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
            )

    for key in set(keys(ours)) - set(keys(plain)):
        assert f"`{key}`" in README or f"`{key.removeprefix('MODEL.RETINANET.')}`" in README, key


def test_commands_name_files_that_exist():
    for name in re.findall(r"--config-file (configs/\S+\.yaml)", README):
        assert (ROOT / name).is_file()
    assert digits.SPEC.num_val == 200  # "COCO's evaluation of 200 images"
