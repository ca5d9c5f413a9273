"""``retina replay``: a step is repeated exactly, and its numbers are shown."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from retina_plugin import cli
from retina_plugin.cli import replay as replay_command
from retina_plugin.cli import train as train_command
from retina_plugin.engine import Trainer
from retina_plugin.engine.replay import _config, replay
from retina_plugin.engine.step import StepTrainer
from retina_plugin.engine.step_record import ProcessFacts, StepRecord
from retina_plugin.errors import ConfigError

END = 4  # the iteration that is not finite


@pytest.fixture
def cfg(tiny_cfg, monkeypatch):
    """The learning rate becomes far too high in iteration 3, between two checkpoints."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    tiny_cfg.SEED = 1
    tiny_cfg.DATALOADER.NUM_WORKERS = 0
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 6, 3
    tiny_cfg.SOLVER.STEPS, tiny_cfg.SOLVER.GAMMA = (3,), 1e30
    return tiny_cfg


def test_config_is_not_scaled_to_the_processes_again(cfg):
    """The training has done that, see SOLVER.REFERENCE_WORLD_SIZE."""
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    record = StepRecord(END, [ProcessFacts({}), ProcessFacts({})], config=cfg.dump())
    repeated = _config(record, Path(cfg.OUTPUT_DIR, "nonfinite_0000004.json"), [])
    solver = Trainer.auto_scale_workers(repeated, 1).SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (cfg.SOLVER.IMS_PER_BATCH, 6)


@pytest.fixture
def train(cfg, tmp_path, capsys):
    """train(*opts): the error's line, and the file that it names."""

    def run(*opts):
        path = tmp_path / "tiny.yaml"
        path.write_text(cfg.dump())
        with pytest.raises(SystemExit) as end:
            train_command.main(["--config-file", str(path), *opts])
        line = end.value.code
        assert isinstance(line, str) and line.startswith("error: not finite at ")
        assert "\n" not in line and "Traceback" not in capsys.readouterr().out
        file = line.split("`retina replay ")[1].split("`")[0]
        return line, Path(file)

    return run


def run_command(capsys, *arguments):
    """Exit status and what is printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        replay_command.main([str(x) for x in arguments])
    return end.value.code, capsys.readouterr().out


def contents(folder):
    # The log of the training, which runs in the same process here, goes on.
    files = [p for p in Path(folder).rglob("*") if p.is_file() and p.name != "log.txt"]
    return {p: p.read_bytes() for p in files}


def test_step_is_repeated_from_the_last_checkpoint(cfg, train, capsys):
    """To the bit, and nothing is written. With another schedule, the step is finite."""
    line, file = train()
    assert f"iteration={END} " in line and "weights are up to" in line
    assert file == Path(cfg.OUTPUT_DIR) / f"nonfinite_{END:07d}.json"
    out = contents(cfg.OUTPUT_DIR)
    assert {p.name for p in out if p.suffix == ".pth"} == {"model_0000002.pth"}
    status, text = run_command(capsys, file)
    assert status == 0
    assert f"Iteration {END} (counted from 0), from {cfg.OUTPUT_DIR}/model_0000002.pth" in text
    assert f"The step is not finite again: not finite at iteration={END} " in text
    for name in ("p3", "p7", "logits", "gradient of the deltas", "loss_box_reg", "Largest weight"):
        assert name in text, name
    record = StepRecord.read(file)
    for image in record.processes[0].images:
        assert image["file_name"] in text
    assert contents(cfg.OUTPUT_DIR) == out

    status, text = run_command(capsys, file, "SOLVER.GAMMA", "0.1")
    assert status == 1 and "The step is finite this time." in text
    assert "nan" not in text and contents(cfg.OUTPUT_DIR) == out


def test_numbers_are_those_of_the_training(cfg, train):
    """Features, predictions, losses of each image and weights, to the bit."""
    _, file = train()
    saved = StepRecord.read(file).processes[0].diagnosis
    found = replay(file).diagnosis.as_dict()
    # The file has NaN as text.
    text = json.loads(json.dumps(saved))
    for key in ("losses", "weights", "largest_weight", "levels", "module", "num_bad_gradients"):
        assert _as_text(found[key]) == _as_text(text[key]), key
    assert found["largest_weight"] > 1e20


def _as_text(value):
    if isinstance(value, dict):
        return {k: _as_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_text(v) for v in value]
    return str(value)


def test_step_before_the_first_checkpoint(cfg, train, capsys):
    """It is repeated from the weights that the training began with."""
    cfg.SOLVER.STEPS = (1,)
    _, file = train()
    saved = StepRecord.read(file)
    assert saved.iteration == 2 and saved.last_checkpoint == ""
    result = replay(file)
    assert result.is_reproduced and (result.start, result.checkpoint) == (0, "")
    assert result.diagnosis.largest_weight == float(saved.processes[0].diagnosis["largest_weight"])
    assert not replay(file, ["SOLVER.GAMMA", "1.0"]).is_reproduced


def test_folder_may_have_moved(cfg, train, tmp_path):
    """The checkpoint is looked for beside the file. Without it there is one line."""
    _, file = train()
    moved = tmp_path / "elsewhere"
    shutil.move(cfg.OUTPUT_DIR, moved)
    result = replay(moved / file.name)
    assert result.is_reproduced and result.checkpoint == str(moved / "model_0000002.pth")
    (moved / "model_0000002.pth").unlink()
    with pytest.raises(ConfigError, match="there is no .*model_0000002.pth"):
        replay(moved / file.name)


def test_run_that_does_not_get_there(cfg, train, capsys):
    """With overrides, an earlier step may not be finite."""
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    _, file = train()
    status, text = run_command(capsys, file, "SOLVER.BASE_LR", "1e30", "SOLVER.GAMMA", "1.0")
    assert status == 1
    assert "The run did not get there: not finite at iteration=1 " in text


def test_training_of_two_processes_is_repeated_by_one(cfg, train, monkeypatch):
    """The images of each process become a pass."""
    _, file = train()
    record = StepRecord.read(file)
    (process,) = record.processes
    halves = [
        type(process)(
            process.losses,
            process.images[i : i + 1],
            process.samples[i : i + 1],
            process.random_states,
            process.loader,
        )
        for i in (0, 1)
    ]
    record.processes = halves
    record.write(file.parent)
    seen = []
    split = StepTrainer.split
    monkeypatch.setattr(
        StepTrainer, "split", lambda self, data: seen.append(self.passes) or split(self, data)
    )
    result = replay(file)
    assert result.is_reproduced and set(seen) == {2}
    assert [x.file_name for x in result.diagnosis.images] == [
        half.images[0]["file_name"] for half in halves
    ]


def test_file_cannot_make_code_run(cfg, train, tmp_path):
    """``IMPORTS`` is followed only if the command line names it."""
    marker = tmp_path / "marker"
    module = tmp_path / "own_module_of_a_replay.py"
    module.write_text(f"open({str(marker)!r}, 'a').close()\n")
    cfg.IMPORTS = (str(module),)
    _, file = train()
    marker.unlink()
    del sys.modules["own_module_of_a_replay"]
    with pytest.raises(ConfigError, match="the training imported .*own_module_of_a_replay.py"):
        replay(file)
    assert not marker.exists()
    assert replay(file, ["IMPORTS", str([str(module)])]).is_reproduced
    assert marker.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["missing.json"], "cannot read missing.json"), (["x.json", "SOLVER.BASE_LR"], "KEY VALUE")],
)
def test_mistakes_are_one_line(arguments, expected):
    with pytest.raises(SystemExit) as end:
        cli.main(["replay", *arguments])
    assert end.value.code.startswith("error: ") and expected in end.value.code
