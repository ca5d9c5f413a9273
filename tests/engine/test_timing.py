"""The timed step: in a process of its own, whose death is one line. A process takes seconds."""

import pytest

from retina_plugin.engine.timing import measure_step
from retina_plugin.errors import ConfigError


@pytest.mark.slow
def test_step_is_measured(tiny_cfg, tmp_path):
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "eager"  # the others have to be compiled first
    cost = measure_step(tiny_cfg)
    assert cost.seconds > 0 and (cost.images, cost.processes) == (2, 1)
    # a process with PyTorch has more than 100 MB, and the machine more than it
    assert 100 * 2**20 < cost.memory_bytes < cost.total_bytes
    assert cost.device.startswith("cpu (")
    assert not (tmp_path / "output").exists()  # nothing is written where a training would


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_step_is_that_of_the_scaled_training(tiny_cfg, processes):
    """A process has the images that it has on the GPUs that the config is meant for."""
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "eager"
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = 12, 4
    cost = measure_step(tiny_cfg, processes)
    assert (cost.images, cost.processes) == (3, processes)
    assert tiny_cfg.SOLVER.IMS_PER_BATCH == 12


def in_child(tmp_path, code):
    """An IMPORTS file whose code runs in the process of the step only."""
    file = tmp_path / "user_code.py"
    file.write_text(
        f"import multiprocessing, os, signal\nif multiprocessing.parent_process():\n    {code}\n"
    )
    return (str(file),)


def test_step_that_is_killed_is_one_line(tiny_cfg, tmp_path):
    """As when memory runs out."""
    tiny_cfg.IMPORTS = in_child(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ConfigError, match="IMS_PER_BATCH 2: .* SIGKILL.*memory runs out: lower it"):
        measure_step(tiny_cfg)


@pytest.mark.slow
def test_error_of_the_step_is_one_line(tiny_cfg, tmp_path):
    tiny_cfg.IMPORTS = in_child(tmp_path, "raise RuntimeError('first line\\nno such layer')")
    with pytest.raises(ConfigError, match="^RuntimeError: no such layer$"):
        measure_step(tiny_cfg)
