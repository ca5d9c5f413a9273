"""Experiment trackers and the pictures of an evaluation."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retina_plugin.engine import Trainer
from retina_plugin.engine.checks import check_run
from retina_plugin.engine.signals import Interrupted
from retina_plugin.engine.tracking import (
    TRACKER_REGISTRY,
    MLflowWriter,
    Tracker,
    WandbWriter,
    build_trackers,
    check_trackers,
)
from retina_plugin.errors import ConfigError


class Recording(Tracker):
    """A tracker that keeps what it is sent."""

    def start(self, cfg, run):
        self.given, self.sent, self.images, self.ended = run, [], [], []
        random.random()  # clients draw names
        return run or "first"

    def log(self, scalars, iteration):
        self.sent.append((iteration, dict(scalars)))

    def log_image(self, name, image, iteration):
        self.images.append((iteration, name, image))

    def finish(self, error):
        self.ended.append(error)


class Broken(Recording):
    def log(self, scalars, iteration):
        raise RuntimeError("no network")


@pytest.fixture
def registered():
    for cls in (Recording, Broken):
        TRACKER_REGISTRY.register(cls)
    yield
    for cls in (Recording, Broken):
        TRACKER_REGISTRY._obj_map.pop(cls.__name__)


@pytest.fixture
def cfg(tiny_cfg):
    Path(tiny_cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    return tiny_cfg


def write(tracker, iteration):
    with EventStorage(iteration) as storage:
        storage.put_scalar("loss", 0.5)
        storage.put_image("picture", np.full((3, 4, 5), 7, np.uint8))
        tracker.write()
        tracker.write()
        assert len(storage._vis_data) == 1  # TensorBoard's writer still finds it


def test_scalars_are_sent_once_and_pictures_as_height_width_channels(cfg):
    tracker = Recording(cfg)
    write(tracker, 3)
    assert tracker.sent == [(3, {"loss": 0.5})]
    assert tracker.images[0][:2] == (3, "picture") and tracker.images[0][2].shape == (4, 5, 3)


def test_resumed_training_goes_on_in_its_run(cfg):
    assert Recording(cfg).given is None
    assert Recording(cfg).given == "first"


def test_nothing_random_is_drawn(cfg):
    state = random.getstate()
    Recording(cfg)
    assert random.getstate() == state


@pytest.mark.parametrize("error", [None, Interrupted(), RuntimeError("NaN")])
def test_run_ends_as_the_training_did(cfg, error):
    tracker = Recording(cfg)
    try:
        try:
            if error is not None:
                raise error
        finally:
            tracker.close()
    except (Interrupted, RuntimeError):
        pass
    tracker.close()
    assert tracker.ended == [error]


def test_failing_client_is_one_warning(cfg, caplog):
    tracker = Broken(cfg)
    write(tracker, 1)
    tracker.close()
    assert caplog.text.count("Broken cannot write: RuntimeError: no network") == 1
    assert tracker.ended == []


def test_named_trackers_are_built_and_no_other(cfg, registered):
    assert build_trackers(cfg) == []
    cfg.TRACKING = ("Recording",)
    assert [type(tracker) for tracker in build_trackers(cfg)] == [Recording]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandb", "must be a list"),
        (("mlflow", "mlflow"), "each once"),
        (("wandbb",), "unknown 'wandbb'"),
        (("wandb",), r"wandb needs wandb .*: pip install wandb"),
        (("mlflow",), r"mlflow needs mlflow .*: pip install mlflow"),
    ],
)
def test_bad_trackers_are_found_before_the_training(cfg, monkeypatch, names, message):
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    cfg.TRACKING = names
    with pytest.raises(ConfigError, match=message):
        check_trackers(cfg)
    with pytest.raises(ConfigError, match=message):
        check_run(cfg, 0)


def test_evaluation_puts_the_same_pictures_each_time(cfg, registered):
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 2, 1
    cfg.TRACKING = ("Recording",)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    events = EventAccumulator(cfg.OUTPUT_DIR)
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("digits_scenes_val/")]
    assert 0 < len(tags) <= 4
    assert all([event.step for event in events.Images(tag)] == [0, 2] for tag in tags)
    assert "bbox/AP" in events.Tags()["scalars"]
    assert json.loads((Path(cfg.OUTPUT_DIR) / "tracking.json").read_text()) == {
        "Recording": "first"
    }


def test_mlflow_continues_its_run(cfg, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    for iteration in (1, 2):
        tracker = MLflowWriter(cfg)
        with EventStorage(iteration) as storage:
            storage.put_scalar("loss", 0.5)
            tracker.write()
        tracker.close()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED" and run.data.params["SOLVER.MAX_ITER"]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2]


def test_wandb_without_a_login_is_one_warning(cfg, monkeypatch, tmp_path, caplog):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    WandbWriter(cfg).close()
    assert "WandbWriter cannot write: ConfigError: no login" in caplog.text
