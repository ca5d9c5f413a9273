"""A small dataset in which faults are planted."""

from __future__ import annotations

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.doctor import Severity, quick_checks


@pytest.fixture
def coco(tiny_cfg, tiny_digits, tmp_path):
    """``coco(edit)`` gives a config of the sets test_train and test_val, faults planted by edit.

    ``edit(content)`` changes what the file of ``split`` holds, or returns the bytes to write. The
    images are copies.
    """
    registered = []

    def plant(edit=None, split="train"):
        for part in ("train", "val"):
            name = f"test_{part}"
            if name in registered:
                continue
            content = json.loads((tiny_digits / f"{part}.json").read_text())
            data = edit(content) if edit is not None and part == split else None
            data = data if isinstance(data, bytes) else json.dumps(content).encode()
            (tmp_path / f"{part}.json").write_bytes(data)
            shutil.copytree(tiny_digits / part, tmp_path / part)
            register_coco_instances(name, {}, str(tmp_path / f"{part}.json"), str(tmp_path / part))
            registered.append(name)
        tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = ("test_train",), ("test_val",)
        return tiny_cfg

    yield plant
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


@pytest.fixture
def found():
    """``found(cfg)``: the lines of the quick checks' errors and warnings, in two lists."""

    def find(cfg, **kwargs):
        findings = list(quick_checks(cfg, **kwargs))
        lines = {severity: [] for severity in Severity}
        for finding in findings:
            assert "\n" not in str(finding)
            lines[finding.severity].append(str(finding))
        return lines[Severity.ERROR], lines[Severity.WARNING]

    return find
