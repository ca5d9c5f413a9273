"""Each planted fault has the outcome that docs/reliability.md states."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.cli import main as retina
from tests.faults.faults import FAULTS, _state_dict
from tests.faults.planting import World

NAMES = ("fault_train", "fault_val")


def run(world, capsys):
    """Exit line (None if it ended well), warnings, metrics by name."""
    world.config["MODEL"]["META_ARCHITECTURE"] = "FocalRetinaNet"
    world.write()
    for name in NAMES:
        split = name.removeprefix("fault_")
        register_coco_instances(name, {}, str(world.json_file(split)), str(world.root / split))
    command = ["train", "--config-file", str(world.config_file), "--num-gpus", "0"]
    try:
        retina([*command, *(["--eval-only"] if world.eval_only else []), *world.overrides])
        line = None
    except SystemExit as end:
        line = end.code
    finally:
        for name in NAMES:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
    printed = capsys.readouterr()
    return line, printed.out + printed.err, results(world.root / "output")


def results(out):
    """What was learned and what was detected: everything but times."""
    found = {}
    metrics = out / "metrics.json"
    if metrics.is_file():
        for text in metrics.read_text().splitlines():
            found |= {k: v for k, v in json.loads(text).items() if "loss" in k or "AP" in k}
    for path in sorted(out.glob("inference/*/coco_instances_results.json")):
        found[path.name] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def without_fault():
    """Results of the run without a fault, by ``eval_only``."""
    return {}


CASES = [
    pytest.param(
        fault,
        id=f"{fault.section}: {fault.what}",
        marks=[pytest.mark.slow] * fault.is_slow,
    )
    for fault in FAULTS
]


@pytest.mark.parametrize("fault", CASES)
def test_planted_fault(fault, tmp_path, capsys, without_fault):
    world = World(tmp_path / "world")
    fault.plant(world)
    line, printed, got = run(world, capsys)
    assert not world.marker.exists(), "code in the file has run"
    if fault.outcome == "error":
        assert isinstance(line, str) and line.startswith("error: "), line
        assert len(line.splitlines()) == 1 and re.search(fault.says, line), line
        assert "Traceback" not in printed
        return
    assert line is None, line
    if fault.outcome == "warning":
        assert re.search(rf"WARNING: .*{fault.says}", printed), printed
        return
    if world.eval_only not in without_fault:
        whole = World(tmp_path / "whole")
        whole.eval_only = world.eval_only
        if whole.eval_only:
            whole.save_weights({"model": _state_dict(whole)})
        line, _, without_fault[world.eval_only] = run(whole, capsys)
        assert line is None and without_fault[world.eval_only]
    assert got == without_fault[world.eval_only]


def test_names_are_unique():
    names = [(fault.section, fault.what) for fault in FAULTS]
    assert len(set(names)) == len(names)
