"""What data of every kind do to a run of the command, from start to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.cli import train as train_command
from retina_plugin.engine import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tiny_cfg, tiny_digits, tmp_path, monkeypatch):
    """``run(edit, *arguments)`` runs the command on copies of the sets, changed by ``edit``.

    ``edit(folder, contents)`` changes files, and what train.json and val.json hold.
    """
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_train",), ("test_val",)

    def main(edit, *arguments):
        contents = {}
        for part in ("train", "val"):
            shutil.copytree(tiny_digits / part, tmp_path / part)
            contents[part] = json.loads((tiny_digits / f"{part}.json").read_text())
        edit(tmp_path, contents)
        for part, content in contents.items():
            file = tmp_path / f"{part}.json"
            file.write_text(json.dumps(content))
            register_coco_instances(f"test_{part}", {}, str(file), str(tmp_path / part))
        (tmp_path / "a.yaml").write_text(tiny_cfg.dump())
        train_command.main(["--config-file", str(tmp_path / "a.yaml"), *arguments])
        return Path(tiny_cfg.OUTPUT_DIR)

    yield main
    for part in ("train", "val"):
        if f"test_{part}" in DatasetCatalog:
            DatasetCatalog.remove(f"test_{part}")
            MetadataCatalog.pop(f"test_{part}")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def line_of(run, *arguments):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def test_masks_on_some_boxes(run):
    """Polygons, none, and a mask, in the test set: the pictures read boxes only."""

    def edit(folder, contents):
        for i, annotation in enumerate(contents["val"]["annotations"]):
            annotation["segmentation"] = [
                [],
                [[1, 1, 9, 1, 9, 9]],
                {"counts": [0, 4096], "size": [64, 64]},
            ][i % 3]

    out = run(edit)
    assert (out / "detections.png").is_file() and (out / "model_final.pth").is_file()


def test_training_in_yuv(run):
    """INPUT.FORMAT YUV-BT.601, which our own message offers. Values are about 0 to 1."""
    pixels = ["MODEL.PIXEL_MEAN", "[0.5,0.0,0.0]", "MODEL.PIXEL_STD", "[0.2,0.1,0.1]"]
    out = run(lambda *_: None, "INPUT.FORMAT", "YUV-BT.601", *pixels)
    assert "bbox/AP" in {key for line in metrics(out) for key in line}
    assert (out / "detections.png").is_file()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_images_are_skipped_if_the_config_says_so(run, workers):
    """Otherwise the first one ends the training, with its name."""

    def edit(folder, contents):
        for image in contents["train"]["images"][:4]:
            path = folder / "train" / image["file_name"]
            path.write_bytes(path.read_bytes()[:500])

    overrides = ["DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", "4"]
    out = run(edit, *overrides, "DATALOADER.ON_BAD_IMAGE", "skip")
    assert (out / "model_final.pth").is_file()
    assert "1. of this process: cannot read the image" in (out / "log.txt").read_text()


def test_bad_image_ends_the_training(run):
    def edit(folder, contents):
        for path in (folder / "train").iterdir():
            path.write_bytes(path.read_bytes()[:500])

    line = line_of(run, edit)
    assert line.startswith("error: cannot read the image ") and "/train/00000" in line


def test_bad_image_of_a_test_set_is_never_skipped(run):
    def edit(folder, contents):
        path = folder / "val" / "000002.png"
        path.write_bytes(path.read_bytes()[:500])

    line = line_of(run, edit, "DATALOADER.ON_BAD_IMAGE", "skip")
    assert line.startswith("error: cannot read the image ") and "/val/000002.png" in line


def test_other_classes_are_evaluated(run, tiny_cfg, tmp_path):
    """A set of 7 classes, with DATASETS.TRAIN left at one of 10."""

    def edit(folder, contents):
        content = contents["val"]
        content["categories"] = content["categories"][:7]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 7]

    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 7
    torch.save({"model": Trainer.build_model(tiny_cfg).state_dict()}, tmp_path / "seven.pth")
    out = run(edit, "--eval-only", "MODEL.WEIGHTS", str(tmp_path / "seven.pth"))
    assert (out / "inference/test_val/coco_instances_results.json").is_file()


def test_other_class_order_is_one_line(run):
    """Before anything is built."""

    def edit(folder, contents):
        names = contents["val"]["categories"]
        names[0]["name"], names[1]["name"] = names[1]["name"], names[0]["name"]

    line = line_of(run, edit)
    assert line.startswith("error: test_val: class 0 is '1', but '0' in test_train")


def test_missing_area_does_not_matter(run):
    """Nor does iscrowd: the training ends with an AP."""

    def edit(folder, contents):
        for annotation in contents["val"]["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    assert "bbox/AP" in {key for line in metrics(run(edit)) for key in line}
