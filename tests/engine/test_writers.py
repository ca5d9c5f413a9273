"""Log files: what a resume drops, and full disks."""

import errno
import json
import logging
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retina_plugin.engine import Trainer
from retina_plugin.engine.console import _survive_errors
from retina_plugin.engine.writers import Writers, trim_metrics


def line(iteration, **values):
    return json.dumps({"iteration": iteration, **values}) + "\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        (line(19) + line(9, ap=1.0) + line(39), line(19) + line(9, ap=1.0)),
        (line(19) + line(39)[:-9], line(19)),  # torn
        (line(19) + line(19)[:-1], line(19)),  # torn at the very end
        (line(9) + "\0\0\n[1]\n{}\n" + line(19), line(9) + line(19)),
        (line(19, ap=float("nan")), line(19, ap=float("nan"))),
        (line(39) + line(19), line(19)),
    ],
)
def test_lines_after_the_checkpoint_and_torn_ones_are_dropped(tmp_path, text, kept):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    trim_metrics(path, 19)
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_missing_metrics_stay_missing(tmp_path):
    trim_metrics(tmp_path / "metrics.json", 19)
    assert not list(tmp_path.iterdir())


class Full(EventWriter):
    """Its disk is full."""

    def __init__(self):
        self.writes = 0

    def write(self):
        self.writes += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    close = write


def test_writer_that_cannot_write_is_one_warning(tmp_path, log):
    """The others write on."""
    full, path = Full(), tmp_path / "metrics.json"
    hook = Writers(lambda: [full, JSONWriter(str(path))], period=1)
    hook.trainer = type("Trainer", (), {"max_iter": 3})
    hook.before_train()
    with EventStorage() as storage:
        for storage.iter in range(3):
            hook.trainer.iter = storage.iter
            storage.put_scalar("loss", 1.0)
            hook.after_step()
        hook.after_train()
    assert full.writes == 5
    assert len(path.read_text().splitlines()) == 3
    assert len([r for r in log.records if r.levelno == logging.WARNING]) == 1
    assert "Full cannot write" in log.text and "The training goes on" in log.text


def test_tensorboard_hides_what_is_repeated(tiny_cfg):
    """Of a training that was resumed at an earlier iteration than the last one written."""
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    folder = Path(tiny_cfg.OUTPUT_DIR)
    for resume in (False, True):
        trainer = Trainer(tiny_cfg)
        trainer.resume_or_load(resume=resume)
        for hook in trainer._hooks:
            if isinstance(hook, Writers):
                hook._period = 1
        trainer.train()
        (folder / "last_checkpoint").write_text("model_0000001.pth")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("total_loss")] == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_log_that_cannot_be_written_is_one_warning(log, capfd):
    """And no traceback, neither now nor at the end of the process."""
    logger = logging.getLogger("retina_plugin")
    handler = logging.StreamHandler(open("/dev/full", "w"))  # noqa: SIM115
    _survive_errors(handler)
    logger.addHandler(handler)
    logger.info("one")
    logger.info("two")
    assert len([r for r in log.records if r.levelno == logging.WARNING]) == 1
    assert "cannot write /dev/full: No space left on device. The training goes on" in log.text
    assert capfd.readouterr().err == ""
