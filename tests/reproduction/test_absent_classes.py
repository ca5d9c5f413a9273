"""The sparse scenes with classes that never occur."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from reproduction import absent_classes
from retina_plugin.doctor import Severity, quick_checks
from retina_plugin.engine import setup_cfg


@pytest.mark.parametrize("split", ["train", "dev", "val"])
def test_objects_are_those_of_the_sparse_scenes(tiny_sparse, split):
    wide, plain = (DatasetCatalog.get(f"digits_sparse{x}_{split}") for x in ("_80", ""))
    assert wide == plain
    metadata = MetadataCatalog.get(f"digits_sparse_80_{split}")
    assert metadata.thing_classes == absent_classes.CLASSES and len(absent_classes.CLASSES) == 80
    written = json.loads(Path(metadata.json_file).read_text())
    assert len(written["categories"]) == 80


def test_mini_scale_trains_on_them(repo, tiny_sparse):
    """The doctor finds no error, which it does if the number of classes differs."""

    def errors(num_classes):
        names = [f"('digits_sparse_80_{split}',)" for split in ("train", "val")]
        opts = ["DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1], "MODEL.WEIGHTS", ""]
        opts += ["MODEL.RETINANET.NUM_CLASSES", str(num_classes), "MODEL.DEVICE", "cpu"]
        cfg = setup_cfg(str(repo / "reproduction" / "mini.yaml"), opts)
        return [f for f in quick_checks(cfg) if f.severity == Severity.ERROR]

    assert errors(80) == [] and errors(10) != []
