"""OUTPUT_DIR: errors in one line, one training at a time, earlier trainings are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retina_plugin.engine import Trainer, output
from retina_plugin.engine.console import start_log
from retina_plugin.errors import ConfigError


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("retina_plugin.engine.hooks.Results._draw", lambda self, out: None)


HOLD = """
import fcntl, json, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(json.dumps({"pid": 4711, "host": "node7", "begins": False}))
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "out"
    yield path
    output.release(str(path))


@pytest.fixture
def held(folder):
    """Another process trains in the folder."""
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_folder_in_use_is_refused(folder, held):
    """With the process and the host of the other training."""
    with pytest.raises(ConfigError, match=r"in use by another training \(process 4711 on node7\)"):
        output.claim(str(folder))
    with pytest.raises(ConfigError, match="in use by another training"):
        output.claim(str(folder))
    assert not output.begun_anew(str(folder))


def test_killed_training_leaves_nothing_locked(folder, held):
    held.kill()
    held.wait()
    output.claim(str(folder))


def test_folder_of_this_process_can_be_claimed_again(folder):
    output.claim(str(folder))
    output.claim(str(folder / ".." / folder.name))
    output.release(str(folder))
    output.release(str(folder))
    output.claim(str(folder))
    assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("claims", [output.claim, output.make])
def test_unusable_folder_is_one_line(tmp_path, claims):
    file = tmp_path / "file"
    file.write_text("")
    for name, reason in (
        ("", "OUTPUT_DIR is empty: name a folder"),
        (str(file), f"OUTPUT_DIR {file} cannot be written to (File exists)"),
        (
            str(file / "below"),
            f"OUTPUT_DIR {file / 'below'} cannot be written to (Not a directory)",
        ),
        ("/proc/here", "OUTPUT_DIR /proc/here cannot be written to"),
        ("/dev/null/x", "OUTPUT_DIR /dev/null/x cannot be written to (Not a directory)"),
    ):
        with pytest.raises(ConfigError) as error:
            claims(name)
        assert str(error.value).startswith(reason) and "\n" not in str(error.value)


@pytest.mark.parametrize("eval_only", [True, False])
def test_full_disk_is_one_line_before_anything_is_logged(tiny_cfg, monkeypatch, eval_only):
    """A disk that takes the folder and no byte."""

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    args = type("Args", (), {"eval_only": eval_only, "resume": False, "config_file": ""})
    with pytest.raises(ConfigError, match=r"cannot be written to \(No space left on device\)"):
        start_log(tiny_cfg, args)
    assert not (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").exists()


def fill(folder):
    """What a training leaves behind, and files of the user."""
    folder.mkdir(exist_ok=True)
    ours = ["model_0000009.pth", "model_final.pth", "model_best.pth", "model_best.json"]
    ours += ["last_checkpoint", "metrics.json", "events.out.tfevents.1.host", "detections.png"]
    for name in [*ours, "weights.pth", "notes.txt", "log.txt"]:
        (folder / name).write_text(name)
    (folder / "inference").mkdir()
    (folder / "inference" / "results.json").write_text("results")
    return {*ours, "inference"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_earlier_training_is_moved_away(folder, log):
    """Nothing else is, and nothing is overwritten, however often that happens."""
    for number in (1, 2, 3):
        ours = fill(folder)
        output.claim(str(folder))
        output.begin(str(folder))
        assert names(folder / f"earlier-{number}") == ours
        assert (folder / f"earlier-{number}" / "inference" / "results.json").is_file()
        (folder / f"earlier-{number}" / "model_final.pth").write_text(f"training {number}")
        assert f"OUTPUT_DIR held an earlier training: its 9 files are in {folder}" in log.text
    assert (folder / "earlier-1" / "model_final.pth").read_text() == "training 1"
    rest = {"weights.pth", "notes.txt", "log.txt", ".lock"}
    assert names(folder) == {*rest, "earlier-1", "earlier-2", "earlier-3"}


def test_resumed_training_keeps_its_files(folder, log):
    ours = fill(folder)
    output.claim(str(folder))
    output.begin(str(folder), resumed=True)
    assert ours <= names(folder) and not log.messages


def test_new_folder_is_left_alone(folder, log):
    output.claim(str(folder))
    output.begin(str(folder))
    assert names(folder) == {".lock"} and not log.messages


class Killed(BaseException):
    pass


@pytest.fixture
def killed_while_moving(monkeypatch):
    """``begin`` that moves one file and is killed."""

    def begin(folder):
        moved = []

        def rename(self, target):
            if moved:
                raise Killed
            moved.append(target)
            return os.replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            output.claim(folder)
            with pytest.raises(Killed):
                output.begin(folder)
        output.release(folder)  # as the kernel does

    return begin


def test_training_killed_while_it_moves_files_is_remembered(folder, killed_while_moving):
    """A resume must not pick up the rest of the earlier one."""
    fill(folder)
    killed_while_moving(str(folder))
    output.claim(str(folder))  # --resume
    assert output.begun_anew(str(folder))
    output.begin(str(folder))
    assert not output.begun_anew(str(folder))
    output.release(str(folder))
    output.claim(str(folder))
    assert not output.begun_anew(str(folder))


def test_resume_of_a_training_killed_before_its_first_checkpoint(tiny_cfg, killed_while_moving):
    """Run B begins in the folder of A and is killed; --resume starts B anew."""
    tiny_cfg.DATASETS.TEST = ()
    folder = Path(tiny_cfg.OUTPUT_DIR)
    Trainer(tiny_cfg).train()
    for moved in (False, True):
        if moved:
            output.claim(str(folder))
            output.begin(str(folder))
            output.release(str(folder))
        else:
            killed_while_moving(str(folder))
        trainer = Trainer(tiny_cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 0
        trainer.train()
        lines = (folder / "metrics.json").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1]
    assert (folder / "earlier-3" / "model_final.pth").is_file()


def test_training_that_moved_nothing_leaves_the_earlier_one_to_resume(tiny_cfg):
    """Started without --resume by mistake, and ended before it began."""
    tiny_cfg.DATASETS.TEST = ()
    Trainer(tiny_cfg).train()
    output.claim(tiny_cfg.OUTPUT_DIR)
    output.release(tiny_cfg.OUTPUT_DIR)
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


def test_weights_of_the_earlier_training_can_be_used(tiny_cfg):
    """They are read before they are moved."""
    tiny_cfg.DATASETS.TEST = ()
    Trainer(tiny_cfg).train()
    tiny_cfg.MODEL.WEIGHTS = str(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth")
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (Path(tiny_cfg.OUTPUT_DIR) / "earlier-1" / "model_final.pth").is_file()
    assert (Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth").is_file()


def test_folder_is_free_after_a_training(tiny_cfg):
    """Also after one that failed."""
    tiny_cfg.DATASETS.TEST = ()
    trainer = Trainer(tiny_cfg)
    trainer.run_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert Path(tiny_cfg.OUTPUT_DIR).resolve() not in output._claimed
