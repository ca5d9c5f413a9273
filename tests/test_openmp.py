"""GNU OpenMP's waiting threads do not spin for long, unless the user wants that."""

import os
import subprocess
import sys

import pytest

PRINT = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("imports", "own", "expected"),
    [
        ("import retina_plugin", {}, "1000 None"),
        _slow("import retina_plugin", {"GOMP_SPINCOUNT": "7"}, "7 None"),
        _slow("import retina_plugin", {"OMP_WAIT_POLICY": "active"}, "None active"),
        # OpenMP has read its variables by then
        _slow("import torch, retina_plugin", {}, "None None"),
    ],
)
def test_spinning_is_limited_before_torch_is_imported(repo, imports, own, expected):
    """The user's choice stands."""
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | own | {"PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", f"{imports}\n{PRINT}"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == expected, result.stderr


def test_train_net_imports_the_package_first(repo):
    """Before torch, which loads OpenMP."""
    lines = (repo / "train_net.py").read_text().splitlines()
    assert not any("torch" in line for line in lines)
