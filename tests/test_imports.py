"""Imports go one way: the contracts of [tool.importlinter] in pyproject.toml hold."""

import os
import shutil
import subprocess
import sys

import pytest


def lint_imports(folder):
    """Exit status and output of import-linter there."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_imports_go_one_way(repo):
    status, said = lint_imports(repo)
    assert status == 0, said


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("retina_plugin/losses/functional.py", "from .targets import DenseTargets"),
        ("retina_plugin/losses/classification.py", "from .dense import DenseLoss"),
        ("retina_plugin/losses/dense.py", "import detectron2.layers"),
        ("retina_plugin/losses/dense.py", "from ..modeling.shapes import gather_anchors"),
        ("retina_plugin/modeling/head.py", "from .backbone import build_retina_fpn_backbone"),
        ("retina_plugin/modeling/head.py", "from retina_plugin.engine import Trainer"),
        ("retina_plugin/data/mapper.py", "def f():\n    from retina_plugin.engine import setup"),
        ("retina_plugin/engine/trainer.py", "from retina_plugin.cli import main"),
        ("retina_plugin/engine/trainer.py", "import reproduction.paper"),
        ("retina_plugin/new_room.py", "import torch"),
    ],
)
def test_forbidden_import_is_found(repo, tmp_path, file, line):
    for name in ("retina_plugin", "benchmarks", "reproduction"):
        shutil.copytree(repo / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repo / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    status, said = lint_imports(tmp_path)
    assert status == 1 and "BROKEN" in said, said
