"""Rows of the paper are planned, trained, recorded and not trained again."""

import json
import signal
import subprocess
import sys
import time

import pytest

from reproduction import plan, reproduce
from reproduction.intervals import RESAMPLES
from reproduction.paper import load_paper
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError

# without MODEL.WEIGHTS: pretraining the backbone of the mini scale takes a minute
SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
SHORT += ["MODEL.WEIGHTS", ""]


def planned(*tables, rows=(), scale="mini", seeds=1):
    return plan.plan(plan.select_rows(tables, rows), scale, seeds)


def test_rows_of_one_experiment_share_a_run():
    runs = planned("1b", "1c", "1d", "3", rows=["gamma=2", "3x3", "FL"])
    assert [run.rows for run in runs] == [["1b gamma=2", "1c 3x3", "1d FL", "3 FL"]]


def test_runs_of_a_row_differ_in_the_seed_only():
    first, second = planned("1b", rows=["gamma=2"], seeds=2)
    assert first.key.split("-")[0] == second.key.split("-")[0] and first.key != second.key
    assert first.opts[:-1] == second.opts[:-1] and (first.opts[-1], second.opts[-1]) == ("1", "2")


def test_different_rows_are_different_runs():
    runs = planned(*plan.MINI_TABLES)
    rows = [row for run in runs for row in run.rows]
    assert len(rows) == sum(len(load_paper()[t].rows) for t in plan.MINI_TABLES)
    # 3x3, Table 1d's FL and Table 3's FL are 1b's gamma=2; 1b's gamma=0 and Table 3's CE are 1a's
    # alpha=0.75
    assert len(runs) == len(rows) - 5
    opts = [tuple(run.opts) for run in runs]
    assert len(set(opts)) == len(opts)


def test_mini_takes_loss_sampler_and_anchors_from_the_row():
    (run,) = planned("1c", rows=["2x1"])
    overrides = dict(zip(run.opts[::2], run.opts[1::2]))
    sizes = eval(overrides["MODEL.ANCHOR_GENERATOR.SIZES"])
    assert [len(s) for s in sizes] == [2] * 5 and [s[0] for s in sizes] == [16, 32, 64, 128, 256]
    (run,) = planned("1d", rows=["OHEM 1:3 256 0.5"])
    overrides = dict(zip(run.opts[::2], run.opts[1::2]))
    assert overrides["MODEL.RETINANET.SAMPLER"] == "OHEM"
    assert overrides["MODEL.RETINANET.OHEM.BATCH_SIZE"] == "256"
    assert overrides["MODEL.RETINANET.OHEM.POSITIVE_FRACTION"] == "0.25"


def test_ohem_has_another_learning_rate_at_the_mini_scale():
    (ohem,) = planned("1d", rows=["OHEM 128 0.5"])
    (focal,) = planned("1d", rows=["FL"])
    assert setup_cfg(str(focal.config), focal.opts).SOLVER.BASE_LR == 0.0075
    assert setup_cfg(str(ohem.config), ohem.opts).SOLVER.BASE_LR == 0.03


def test_override_of_the_loss_keeps_rows_apart_that_are_equal_without_it():
    """1b's gamma=0 is 1a's alpha=0.75, but with gamma 2 it is the focal loss."""
    rows = plan.select_rows(["1a", "1b"], ["alpha=0.75", "gamma=0"])
    assert len(plan.plan(rows, "mini", 1)) == 1
    assert len(plan.plan(rows, "mini", 1, ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", "2.0"])) == 2


def test_key_depends_on_settings_overrides_and_seed_but_not_on_imports():
    settings = {
        "MODEL.RETINANET.CLS_LOSS": "FocalLoss",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2.0,
        "IMPORTS": "('a',)",
    }
    key = plan.run_key(settings, (), 1)
    assert plan.run_key({**settings, "IMPORTS": "('b',)"}, (), 1) == key
    assert plan.run_key({**settings, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2}, (), 1) == key
    others = [
        plan.run_key({**settings, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 1.0}, (), 1),
        plan.run_key(settings, ("SOLVER.MAX_ITER", "2"), 1),
        plan.run_key(settings, (), 2),
    ]
    assert len({key, *others}) == 4


def test_paper_scale_trains_the_config_of_the_row():
    (run,) = planned("1e", rows=["R101-800"], scale="paper")
    assert run.config.name == "retina_R101_800.yaml" and run.max_iter == 90000
    assert run.opts == ["SEED", "1"]


@pytest.mark.parametrize("table", ["1e", "2"])
def test_mini_refuses_tables_of_backbones_and_sizes(table):
    with pytest.raises(ConfigError, match=f"Table {table}.*--scale paper"):
        planned(table)


def test_unknown_table_or_row_raises_and_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"TABLE: unknown '4'; known: 5\.1, 1a, .*, all"):
        planned("4")
    with pytest.raises(ConfigError, match=r"--rows: unknown 'gamma=3'.*; known: gamma=0, "):
        planned("1b", rows=["gamma=3"])


def test_dry_run_lists_runs_and_starts_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "start", None)
    ledger = tmp_path / "ledger.json"
    options = ["--scale", "mini", "--seeds", "1", "--dry-run", "--ledger", str(ledger)]
    assert reproduce.main(["1b", *options]) == 0
    assert "1b gamma=0.5" in capsys.readouterr().out
    assert not ledger.exists()


@pytest.mark.parametrize(("rows", "jobs"), [(["gamma=2"], 1), (["gamma=2", "gamma=5"], 2)])
def test_few_runs_share_all_cores(tmp_path, monkeypatch, rows, jobs):
    """A run that is alone gets all threads."""
    asked = []

    def start(run, output, scale, slot, jobs):
        asked.append(jobs)
        run.process = subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(reproduce, "default_jobs", lambda scale: 2)
    monkeypatch.setattr(reproduce, "check_weights", lambda cfg: None)
    monkeypatch.setattr(reproduce, "start", start)
    monkeypatch.setattr(reproduce, "outcome", lambda run: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    where = ["--ledger", str(tmp_path / "ledger.json"), "--seeds", "1"]
    assert reproduce.main(["1b", "--scale", "mini", "--rows", *rows, *where]) == 1
    assert asked == [jobs] * len(rows)


@pytest.mark.parametrize(("status", "ap"), [(0, 31.0), (1, None)])
def test_skipped_step_is_no_divergence(tmp_path, monkeypatch, status, ap):
    """MAX_SKIPPED_STEPS lets a run go on: it has diverged only if it ended so."""
    (run,) = planned("1b", rows=["gamma=2"])
    run.folder = tmp_path
    run.process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
    run.process.wait()
    (tmp_path / "console.txt").write_text("the loss was not finite at iteration=17: skipped\n")
    (tmp_path / "commits.txt").write_text("abc\n")
    lines = [{"iteration": 99, "loss_cls": 1.0, "time": 0.1}, {"iteration": 99, "bbox/AP": 31.0}]
    (tmp_path / "metrics.json").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    monkeypatch.setattr(reproduce, "_resampled", lambda run: [31.0])
    result = reproduce.outcome(run)
    assert (result.get("AP"), result.get("diverged_at")) == (ap, None if ap else 17)


@pytest.mark.parametrize("text", ["<<<<<<<", "[]", '{"mini": {"a-seed1": {}}}'])
def test_file_that_is_no_ledger_is_one_line(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="error: .*ledger.json is not a ledger of") as error:
        reproduce.main(["1b", "--scale", "mini", "--dry-run", "--ledger", str(path)])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_results_are_recorded_and_not_trained_again(tiny_sparse, tmp_path, capsys, monkeypatch):
    """One run diverges and one ends; asked again, the result comes from the ledger."""
    monkeypatch.chdir(tmp_path)
    ledger = tmp_path / "docs" / "ledger.json"
    where = ["--ledger", str(ledger), "--output", str(tmp_path / "runs"), "--seeds", "1"]
    arguments = ["1b", "--scale", "mini", "--rows", "gamma=2", *where, "--set", *SHORT]
    diverging = ["5.1", "--scale", "mini", "--rows", "pi=0.5", *where]
    diverging += ["--set", *SHORT, "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"]
    assert reproduce.main(diverging) == 0
    assert reproduce.main(arguments) == 0

    results = {r["rows"][0]: r for r in json.loads(ledger.read_text())["mini"].values()}
    assert results["5.1 pi=0.5"]["diverged_at"] == 1
    finished = results["1b gamma=2"]
    assert 0 <= finished["AP"] <= finished["AP50"] <= 100 and finished["early_loss"] > 0
    page = ledger.with_suffix(".md").read_text()
    settings = " ".join(SHORT)
    assert f"| `{settings}` | 1b gamma=2 | {finished['AP']:.1f} |" in page
    assert "| diverged at iteration 1 |" in page
    assert len(finished["resampled_AP"]) == RESAMPLES

    monkeypatch.setattr(reproduce, "start", None)  # nothing starts now
    capsys.readouterr()
    assert reproduce.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 runs, 1 in the ledger" in out and "1b gamma=2: AP" in out


@pytest.mark.slow
def test_interrupted_run_resumes(tiny_sparse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--output", str(tmp_path / "runs"), "--seeds", "1"]
    arguments = ["1b", "--scale", "mini", "--rows", "gamma=2", *where]
    arguments += ["--set", *SHORT, "SOLVER.CHECKPOINT_PERIOD", "1"]
    assert reproduce.main([*arguments, "--ledger", str(tmp_path / "a.json")]) == 0
    # as if it had been interrupted after the first of its two iterations
    (folder,) = (tmp_path / "runs" / "mini").iterdir()
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    assert reproduce.main([*arguments, "--ledger", str(tmp_path / "b.json")]) == 0
    assert "Starting training from iteration 1" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_failed_run_is_not_recorded_and_sets_the_exit_status(tiny_sparse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = tmp_path / "ledger.json"
    where = ["--ledger", str(ledger), "--output", str(tmp_path / "runs"), "--seeds", "1"]
    broken = ["1b", "--scale", "mini", "--rows", "gamma=2", *where]
    broken += ["--set", *SHORT, "MODEL.RETINANET.NUM_CLASSES", "7"]
    assert reproduce.main(broken) == 1
    assert not ledger.exists()


@pytest.mark.slow
def test_killed_command_leaves_no_training(repo, tiny_sparse, tmp_path):
    """SIGTERM, as a scheduler sends it."""
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "reproduction.reproduce", "1b", "--scale", "mini"]
    command += ["--rows", "gamma=2", "--seeds", "1", "--output", str(runs)]
    command += ["--ledger", str(tmp_path / "a.json"), "--set", *SHORT, "SOLVER.MAX_ITER", "100000"]
    process = subprocess.Popen(command, cwd=repo, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not list(runs.glob("mini/*/metrics.json")) and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.2)
        assert str(runs) in processes()
    finally:
        process.terminate()
    assert process.wait(60) == 143
    assert str(runs) not in processes()


def processes():
    return subprocess.check_output(["ps", "-ewwo", "args"], text=True)
