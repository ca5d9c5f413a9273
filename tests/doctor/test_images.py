"""Every image of the datasets is read; what is wrong is named."""

import numpy as np
import pytest
from PIL import Image

from retina_plugin.doctor import Severity, check_images


def spoil(folder):
    """Five faults, in five of the eight images; names of the files -> a part of the line."""
    names = [f"00000{i}.png" for i in range(1, 6)]
    (folder / names[0]).unlink()
    data = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(data[: len(data) // 2])
    Image.fromarray(np.full((64, 64), 9000, np.uint16)).save(folder / names[2])
    Image.new("RGB", (64, 63)).save(folder / names[3])
    jpeg = folder / "jpeg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(jpeg, "JPEG", quality=95)
    data = jpeg.read_bytes()
    (folder / names[4]).write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    texts = ["cannot read", "cannot read", "mode I;16", "64x63 pixels", "is damaged (Corrupt JPEG"]
    return dict(zip(names, texts))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_found(coco, tmp_path, workers):
    """In the order of the dataset, with the fault of each, by one process or by several."""
    cfg = coco()
    cfg.DATALOADER.NUM_WORKERS = workers
    assert list(check_images(cfg)) == []
    texts = spoil(tmp_path / "train")
    done = []
    findings = list(check_images(cfg, progress=lambda *numbers: done.append(numbers)))
    assert [f.severity for f in findings] == [Severity.ERROR] * 5
    for finding, (name, text) in zip(findings, texts.items(), strict=True):
        assert finding.where == "test_train" and name in finding.what and text in finding.what
        assert "\n" not in str(finding)
    assert done == [(i, 12) for i in range(1, 13)]
    assert list(check_images(cfg, splits=("TEST",))) == []


def test_images_that_a_training_skips_are_warnings(coco, tmp_path):
    """In a test set they stay errors."""
    cfg = coco()
    cfg.DATALOADER.ON_BAD_IMAGE, cfg.DATALOADER.NUM_WORKERS = "skip", 0
    spoil(tmp_path / "train")
    assert {f.severity for f in check_images(cfg)} == {Severity.WARNING}
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert {f.severity for f in check_images(cfg)} == {Severity.ERROR}


def test_unknown_dataset_is_an_error(tiny_cfg):
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_no",), ()
    (finding,) = check_images(tiny_cfg)
    assert finding.severity is Severity.ERROR and "no dataset 'test_no'" in str(finding)
