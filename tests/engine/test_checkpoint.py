"""Checkpoints and the best one: what is saved, full disks, repairs after a kill."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from retina_plugin.engine import Trainer
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer


class Stop(Exception):
    pass


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Stop


def train(cfg, *hooks, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


@pytest.fixture
def cfg(tiny_cfg):
    """Four iterations; a checkpoint after two, an evaluation after each."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 1
    return tiny_cfg


@pytest.fixture
def folder(cfg):
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("retina_plugin.engine.hooks.Results._draw", lambda self, out: None)


@pytest.fixture
def aps(monkeypatch):
    """Each evaluation returns the next AP of this list."""
    aps = []
    test = classmethod(lambda cls, cfg, model: {"bbox": {"AP": aps.pop(0)}})
    monkeypatch.setattr(Trainer, "test", test)
    return aps


@pytest.fixture
def full_disk(monkeypatch):
    """Files of which the disk is full when they are saved: a set of names without ".pth"."""
    names, save = set(), Checkpointer.save

    def save_or_fail(self, name, **extra):
        if name in names:
            raise OSError(errno.ENOSPC, f"cannot write {self.save_dir}/{name}.pth: disk full")
        save(self, name, **extra)

    monkeypatch.setattr(Checkpointer, "save", save_or_fail)
    return names


def names(folder):
    return {p.name for p in folder.glob("*.pth")}


def interrupt(cfg, at):
    with pytest.raises(Stop):
        train(cfg, StopAt(at))


def record(folder):
    return json.loads((folder / "model_best.json").read_text())


def test_names_are_detectron2s(cfg, folder, aps):
    aps += [1.0, 2.0, 3.0, 4.0]
    train(cfg)
    expected = {"model_0000001.pth", "model_0000003.pth", "model_final.pth", "model_best.pth"}
    assert names(folder) == expected
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_checkpoint_before_an_evaluation_that_fails(cfg, folder, monkeypatch):
    """Is there, and says that the evaluation is still to come."""

    def test(cls, cfg, model):
        raise Stop

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    cfg.TEST.EVAL_PERIOD = 2
    with pytest.raises(Stop):
        train(cfg)
    saved = torch.load(folder / "model_0000001.pth", weights_only=True)
    assert saved["iteration"] == 1 and saved["resume"]["pending"]
    monkeypatch.undo()
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 2
    saved = torch.load(folder / "model_0000001.pth", weights_only=True)
    assert not saved["resume"]["pending"]
    evaluations = [
        line["iteration"]
        for line in map(json.loads, (folder / "metrics.json").read_text().splitlines())
        if "bbox/AP" in line
    ]
    assert evaluations == [1, 4]


def test_failed_save_is_one_line_and_training_goes_on(cfg, folder, aps, full_disk, log):
    """Older checkpoints stay the last ones until another is written."""
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 1, 3, 0
    aps += [1.0]
    full_disk |= {"model_0000001"}
    last = []

    class Last(HookBase):
        def before_step(self):
            path = folder / "last_checkpoint"
            last.append(path.read_text() if path.exists() else "")

    train(cfg, Last())
    assert last == ["", "model_0000000.pth", "model_0000000.pth"]
    (error,) = [r for r in log.records if r.levelno == logging.ERROR]
    text = error.getMessage()
    assert f"{folder}/model_0000001.pth" in text and "the training goes on" in text
    assert "\n" not in text and "model_final.pth" in names(folder)


def test_failed_final_save_is_an_error(cfg, folder, aps, full_disk):
    """Without an evaluation: the run has to be resumed anyway."""
    aps += [1.0, 2.0, 3.0, 4.0]
    full_disk |= {"model_final"}
    with pytest.raises(ConfigError, match="model_final.pth could not be written to .*: make room"):
        train(cfg)
    assert aps == [4.0]
    full_disk.clear()
    assert train(cfg, resume=True).start_iter == 4
    assert "model_final.pth" in names(folder) or "model_0000003.pth" in names(folder)


def test_failed_save_of_the_best_is_one_line(cfg, folder, aps, full_disk, log):
    """The next better one is kept."""
    aps += [1.0, 5.0, 3.0, 4.0]
    full_disk |= {"model_best"}

    class Room(HookBase):
        def before_step(self):
            if self.trainer.iter == 2:
                full_disk.clear()

    train(cfg, Room())
    assert record(folder) == {"bbox/AP": 4.0, "iteration": 4}
    assert len([r for r in log.records if r.levelno == logging.ERROR]) == 2


def test_weights_that_are_not_finite_are_not_saved(cfg, folder, aps):
    """The step says whether they are, before each save."""
    calls = []

    def check_finite():
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("weights")

    trainer = Trainer(cfg)
    trainer._trainer.check_finite = check_finite
    aps += [1.0, 2.0, 3.0]
    with pytest.raises(FloatingPointError, match="weights"):
        trainer.train()
    assert "model_0000003.pth" not in names(folder) and "model_final.pth" not in names(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text(json.dumps({"bbox/AP": 10.0, "iteration": 0})),
        lambda path: path.unlink(),
    ],
    ids=["empty", "torn", "foreign", "older", "missing"],
)
def test_record_is_made_again_from_the_weights(cfg, folder, aps, damage):
    """A kill between the two files, or an editor."""
    aps += [10.0, 40.0, 30.0, 20.0]
    interrupt(cfg, 2)
    damage(folder / "model_best.json")
    train(cfg, resume=True)
    assert record(folder) == {"bbox/AP": 40.0, "iteration": 1}
    assert torch.load(folder / "model_best.pth", weights_only=True)["best"]["value"] == 40.0


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"PK"), lambda path: path.unlink()]
)
def test_best_weights_that_are_damaged_or_missing(cfg, folder, aps, log, damage):
    """The next evaluation counts as the best, and no record stands alone."""
    aps += [10.0, 40.0, 30.0, 20.0]
    interrupt(cfg, 2)
    damage(folder / "model_best.pth")
    train(cfg, resume=True)
    assert record(folder) == {"bbox/AP": 30.0, "iteration": 2}
    assert "model_best" in log.text


def test_best_of_an_older_version_is_kept(cfg, folder, aps):
    """It had the AP in the JSON alone."""
    aps += [10.0, 40.0, 30.0, 20.0]
    interrupt(cfg, 2)
    saved = torch.load(folder / "model_best.pth", weights_only=True)
    del saved["best"]
    torch.save(saved, folder / "model_best.pth")
    train(cfg, resume=True)
    assert record(folder) == {"bbox/AP": 40.0, "iteration": 1}
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize("done", [4, 6])
def test_nothing_left_to_train_is_said(cfg, folder, aps, log, done):
    """The evaluation still runs, at the number of iterations that are done."""
    aps += [1.0] * 8
    cfg.SOLVER.MAX_ITER = done
    train(cfg)
    cfg.SOLVER.MAX_ITER = 4
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == done
    text = f"Nothing is left to train: {done} iterations are done, and SOLVER.MAX_ITER is 4"
    assert text in log.text
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line][-1] == done
    assert [line["iteration"] for line in lines if "total_loss" in line] == [done - 1]


@pytest.mark.parametrize("lost", [True, False])
def test_finished_training_without_its_metrics_is_resumed(cfg, folder, aps, lost, monkeypatch):
    """The pictures are drawn of what is there."""
    monkeypatch.undo()
    cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST = 0, ()
    train(cfg)
    (folder / "metrics.json").unlink()
    if not lost:
        (folder / "metrics.json").write_text("")
    assert train(cfg, resume=True).iter == 4
    assert (folder / "model_final.pth").is_file()
