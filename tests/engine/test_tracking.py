"""What Weights & Biases and MLflow get, and that none of their errors reaches the training.

Their packages are not among the tests' requirements: a module that records the calls takes their
place, and where the real ones are installed, these are tried too.
"""

import json
import logging
import random
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from retina_plugin.doctor import quick_checks
from retina_plugin.engine import Trainer, check_run, tracking
from retina_plugin.engine.signals import Interrupted
from retina_plugin.engine.tracking import build_tracking_writers
from retina_plugin.errors import ConfigError

CLIENTS = ("wandb", "mlflow")


class Recorder(ModuleType):
    """The functions of both clients that are used. A run's id is its number."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="a test")
        self.calls, self.runs, self.key = [], 0, True
        self.before = lambda name: None  # called before each call
        self.Image = self.Settings = lambda *args, **kwargs: (args, kwargs)

    def _record(self, *call):
        self.before(call[0])
        self.calls.append(call)

    def called(self, name):
        return [call[1:] for call in self.calls if call[0] == name]

    def _run(self, run):
        self.runs += not run
        return run or str(self.runs)

    # wandb
    def login(self, prompt):
        assert prompt is False
        return self.key

    def init(self, id, resume, **kwargs):
        self._record("start", id, resume)
        return SimpleNamespace(
            id=self._run(id),
            config=SimpleNamespace(update=lambda d, **kwargs: self._record("params", d)),
            log=self._log,
            mark_preempting=lambda: self._record("preempted"),
            finish=lambda exit_code: self._record("finish", exit_code),
        )

    def _log(self, values, step):
        pictures = {k: v[0][0] for k, v in values.items() if isinstance(v, tuple)}
        for name, picture in pictures.items():
            self._record("picture", name, step, picture)
        if not pictures:
            self._record("scalars", step, values)

    # mlflow
    def start_run(self, run_id, run_name):
        assert run_name
        self._record("start", run_id, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=self._run(run_id)))

    def log_params(self, params):
        self._record("params", params)

    def log_text(self, text, name):
        self._record("text", name, text)

    def log_metrics(self, values, step):
        self._record("scalars", step, values)

    def log_image(self, picture, key, step, synchronous):
        self._record("picture", key, step, picture)

    def end_run(self, status):
        self._record("finish", status)


@pytest.fixture
def client(monkeypatch, tiny_cfg, request):
    """The recorder of a client, which ``tiny_cfg`` names."""
    recorder = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, recorder)
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    # Put back after the test: the writer sets them.
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    tiny_cfg.TRACKING = (request.param,)
    Path(tiny_cfg.OUTPUT_DIR).mkdir()
    return recorder


both = pytest.mark.parametrize("client", CLIENTS, indirect=True)


def measure(cfg, steps, resumed=False, error=None):
    """A training's writes: a loss in each iteration, a picture in every tenth."""
    (writer,) = build_tracking_writers(cfg, resumed)
    with EventStorage(steps[0]) as storage:
        for storage.iter in steps:
            storage.put_scalar("loss", storage.iter / 2, smoothing_hint=False)
            if storage.iter % 10 == 9:
                storage.put_scalar("bbox/AP-a(b)", 1.5, smoothing_hint=False)
                storage.put_image("drawn", torch.full((3, 4, 6), 0.5))
                writer.write()
        try:
            if error is not None:
                raise error
        except BaseException:
            writer.close()
        else:
            writer.close()


def warnings(log):
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


@both
def test_scalars_pictures_and_config_arrive(tiny_cfg, client, log):
    measure(tiny_cfg, range(20))
    name = "bbox/AP-a(b)" if client.__name__ == "wandb" else "bbox/AP-a_b_"
    assert client.called("scalars") == [(step, {"loss": step / 2, name: 1.5}) for step in (9, 19)]
    pictures = client.called("picture")
    assert [(name, step) for name, step, _ in pictures] == [("drawn", 9), ("drawn", 19)]
    assert pictures[0][2].dtype == np.uint8 and pictures[0][2].shape == (4, 6, 3)
    assert (pictures[0][2] == 127).all()
    ((params,),) = client.called("params")
    assert params["SOLVER.MAX_ITER"] == 2 and params["TRACKING"] == (client.__name__,)
    assert client.called("finish") in ([(0,)], [("FINISHED",)])
    assert not warnings(log)


@both
def test_iterations_arrive_in_order(tiny_cfg, client):
    """Weights & Biases drops what comes after a later one."""
    (writer,) = build_tracking_writers(tiny_cfg, False)
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0, cur_iter=30)
        storage.put_scalar("late", 1.0, cur_iter=10)
        storage.iter = 20
        storage.put_image("drawn", np.zeros((3, 2, 2), np.uint8))
        writer.write()
        writer.close()
    sent = [c for c in client.calls if c[0] in ("scalars", "picture")]
    assert [c[1] if c[0] == "scalars" else c[2] for c in sent] == [10, 20, 30]


@both
def test_resumed_training_goes_on_in_its_run_and_repeats_nothing(tiny_cfg, client):
    measure(tiny_cfg, range(20))
    measure(tiny_cfg, range(10, 40), resumed=True)
    assert [call[0] for call in client.called("start")] == [None, "1"]
    assert [call[0] for call in client.called("scalars")] == [9, 19, 29, 39]
    assert [call[1] for call in client.called("picture")] == [9, 19, 29, 39]
    measure(tiny_cfg, range(10))
    assert client.runs == 2
    path = Path(tiny_cfg.OUTPUT_DIR, f"tracking_{client.__name__}.json")
    assert json.loads(path.read_text()) == {"run": "2", "iteration": 9}
    path.write_text("[")
    measure(tiny_cfg, range(10), resumed=True)
    assert client.runs == 3


@both
@pytest.mark.parametrize(
    ("error", "wandb", "mlflow"),
    [(ValueError("no"), (1,), "FAILED"), (Interrupted(), (75,), "KILLED")],
)
def test_run_says_how_the_training_ended(tiny_cfg, client, error, wandb, mlflow):
    measure(tiny_cfg, range(10), error=error)
    assert client.called("finish") == [wandb if client.__name__ == "wandb" else (mlflow,)]
    interrupted = isinstance(error, Interrupted) and client.__name__ == "wandb"
    assert len(client.called("preempted")) == interrupted


@both
@pytest.mark.parametrize("where", ["start", "params", "scalars", "picture", "finish"])
def test_error_of_a_client_is_one_warning(tiny_cfg, client, log, where):
    def fail(name):
        if name == where:
            raise RuntimeError("the server\nis away")

    client.before = fail
    measure(tiny_cfg, range(30))
    (said,) = warnings(log)
    assert said.startswith(client.__name__) and said.endswith("the server. The training goes on")
    assert len(client.called("scalars")) == (0 if where in ("start", "params", "scalars") else 3)


@both
def test_client_that_hangs_does_not_stall_the_training(tiny_cfg, client, log, monkeypatch):
    """What does not fit into the memory kept for it is dropped, and the end waits for a while."""
    monkeypatch.setattr(tracking, "_PATIENCE", 0.1)
    monkeypatch.setattr(tracking, "_RECORDS", 2)
    free = threading.Event()
    client.before = lambda name: name == "scalars" and free.wait(60)
    try:
        measure(tiny_cfg, range(90))
        (said,) = warnings(log)
        assert said.startswith(f"{client.__name__} does not answer")
        assert not client.called("finish")
    finally:
        free.set()


@pytest.mark.parametrize("client", ["wandb"], indirect=True)
def test_missing_key_asks_nothing_on_the_terminal(tiny_cfg, client, log):
    client.key = False
    measure(tiny_cfg, range(10))
    assert "no API key: run `wandb login`" in warnings(log)[0] and not client.calls


@both
def test_training_is_tracked_to_its_last_evaluation(tiny_cfg, client):
    """Through the trainer, whose random numbers stay the same."""
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    scalars = {step: values for step, values in client.called("scalars")}
    assert "total_loss" in scalars[1] and "bbox/AP" in scalars[2]
    assert {name for name, *_ in client.called("picture")} >= {"detections/1_000001"}
    assert client.called("finish") in ([(0,)], [("FINISHED",)])


def test_without_a_name_nothing_is_built(tiny_cfg):
    assert tiny_cfg.TRACKING == () and build_tracking_writers(tiny_cfg, False) == []


@pytest.mark.parametrize("name", CLIENTS)
def test_missing_client_is_one_line(tiny_cfg, name, monkeypatch, tmp_path):
    """A folder of that name, which wandb writes beside a script, is not the package."""
    modules, paths = sys.modules, list(sys.path)
    monkeypatch.delitem(modules, name, raising=False)
    monkeypatch.setattr("sys.path", [p for p in paths if not Path(p, name).exists()])
    tiny_cfg.TRACKING = (name,)
    line = f"TRACKING: {name} is not installed: pip install {name}, or take it out of TRACKING"
    for folder in (False, True):
        if folder:
            (tmp_path / name).mkdir()
            monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError) as error:
            check_run(tiny_cfg, 0)
        assert str(error.value) == line
        assert line in [str(finding) for finding in quick_checks(tiny_cfg)]
    assert line not in [str(f) for f in quick_checks(tiny_cfg, eval_only=True)]


@pytest.mark.parametrize("name", CLIENTS)
def test_real_client_takes_it(tiny_cfg, name, monkeypatch, tmp_path, log):
    """Without a network: into files."""
    pytest.importorskip(name)
    if name == "mlflow":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tiny_cfg.TRACKING = (name,)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    measure(tiny_cfg, range(20))
    measure(tiny_cfg, range(10, 30), resumed=True)
    assert state == (
        *(random.getstate(), np.random.get_state()[1].tolist()),
        torch.get_rng_state().tolist(),
    )
    assert not warnings(log)
    saved = json.loads(Path(tiny_cfg.OUTPUT_DIR, f"tracking_{name}.json").read_text())
    assert saved["iteration"] == 29
    if name == "mlflow":
        client = pytest.importorskip("mlflow").MlflowClient(str((tmp_path / "runs").as_uri()))
        found = client.get_metric_history(saved["run"], "loss")
        assert [(m.step, m.value) for m in found] == [(9, 4.5), (19, 9.5), (29, 14.5)]
        assert client.get_run(saved["run"]).data.params["SOLVER.MAX_ITER"] == "2"
        assert len([f for f in client.list_artifacts(saved["run"], "images")]) == 6
    else:
        runs = list(Path(tiny_cfg.OUTPUT_DIR, "wandb").glob(f"offline-run-*-{saved['run']}"))
        assert len(list(Path(runs[0], "files/media/images").glob("drawn_*.png"))) in (1, 2)
