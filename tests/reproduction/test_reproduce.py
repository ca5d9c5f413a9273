"""The rows of the paper are planned, run, recorded and not run again."""

import json

import pytest

from reproduction import plan, reproduce
from reproduction.paper import load_paper
from retina_plugin.errors import ConfigError

# from scratch: the backbone of the mini scale takes a minute to train
SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
SHORT += ["MODEL.WEIGHTS", ""]


def planned(*tables, rows=(), scale="mini", seeds=1):
    return plan.plan(plan.select_rows(tables, rows), scale, seeds)


def test_rows_that_are_one_experiment_are_one_run():
    runs = planned("1b", "1c", "1d", "3", rows=["gamma=2", "3x3", "FL"])
    assert [run.rows for run in runs] == [["1b gamma=2", "1c 3x3", "1d FL", "3 FL"]]


def test_every_seed_is_a_run_and_seeds_differ_in_the_seed_only():
    first, second = planned("1b", rows=["gamma=2"], seeds=2)
    assert first.key.split("-")[0] == second.key.split("-")[0] and first.key != second.key
    assert first.opts[:-1] == second.opts[:-1] and (first.opts[-1], second.opts[-1]) == ("1", "2")


def test_different_rows_are_different_runs():
    mini_tables = ("5.1", "1a", "1b", "1c", "1d", "3")
    runs = planned(*mini_tables)
    rows = [row for run in runs for row in run.rows]
    assert len(rows) == sum(len(load_paper()[t].rows) for t in mini_tables)
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


def test_mini_has_a_learning_rate_of_its_own_for_ohem():
    """With what the warning compares it with, and in the run's name."""
    (ohem,) = planned("1d", rows=["OHEM 128 0.5"])
    (focal,) = planned("1d", rows=["FL"])
    cfg = plan.setup_cfg(str(ohem.config), ohem.opts)
    other = plan.setup_cfg(str(focal.config), focal.opts)
    assert cfg.SOLVER.BASE_LR != other.SOLVER.BASE_LR
    for c in (cfg, other):
        assert c.SOLVER.LR_PER_IMAGE * c.SOLVER.IMS_PER_BATCH == pytest.approx(c.SOLVER.BASE_LR)
    _, _, settings = plan.recipe(plan.select_rows(["1d"], ["OHEM 128 0.5"])[0], "mini")
    assert settings["SOLVER"]["BASE_LR"] == cfg.SOLVER.BASE_LR


def test_paper_scale_runs_the_rows_own_config():
    (run,) = planned("1e", rows=["R101-800"], scale="paper")
    assert run.config.name == "retina_R101_800.yaml" and run.max_iter == 90000
    assert run.opts == ["SEED", "1"]


@pytest.mark.parametrize("table", ["1e", "2"])
def test_mini_refuses_tables_of_backbones_and_sizes(table):
    with pytest.raises(ConfigError, match=f"Table {table}.*--scale paper"):
        planned(table)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"no table 4; known: 5\.1, 1a"):
        planned("4")
    with pytest.raises(ConfigError, match=r"no row 'gamma=3'; known: gamma=0, "):
        planned("1b", rows=["gamma=3"])


def test_dry_run_lists_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "start", None)
    ledger = tmp_path / "ledger.json"
    options = ["--scale", "mini", "--seeds", "1", "--dry-run", "--ledger", str(ledger)]
    assert reproduce.main(["1b", *options]) == 0
    assert "1b gamma=0.5" in capsys.readouterr().out
    assert not ledger.exists()


def test_rows_run_diverge_and_are_not_run_again(tiny_digits, tmp_path, capsys, monkeypatch):
    """A real run, one that diverges and does not stop it, then the same again from the ledger."""
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
    assert "| gamma=2 | 34.0 |" in page and "diverged at iteration 1 |" in page

    monkeypatch.setattr(reproduce, "start", None)  # nothing starts now
    capsys.readouterr()
    assert reproduce.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 runs, 1 in the ledger" in out and "1b gamma=2: AP" in out


def test_a_run_that_was_cut_off_goes_on(tiny_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--output", str(tmp_path / "runs"), "--seeds", "1"]
    arguments = ["1b", "--scale", "mini", "--rows", "gamma=2", *where]
    arguments += ["--set", *SHORT, "SOLVER.CHECKPOINT_PERIOD", "1"]
    assert reproduce.main([*arguments, "--ledger", str(tmp_path / "a.json")]) == 0
    # as if it had been stopped after the first of its two iterations
    (folder,) = (tmp_path / "runs" / "mini").iterdir()
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    assert reproduce.main([*arguments, "--ledger", str(tmp_path / "b.json")]) == 0
    assert "Starting training from iteration 1" in (folder / "console.txt").read_text()


def test_a_failure_is_not_recorded_and_is_the_exit_status(tiny_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = tmp_path / "ledger.json"
    where = ["--ledger", str(ledger), "--output", str(tmp_path / "runs"), "--seeds", "1"]
    broken = ["1b", "--scale", "mini", "--rows", "gamma=2", *where]
    broken += ["--set", *SHORT, "MODEL.RETINANET.NUM_CLASSES", "7"]
    assert reproduce.main(broken) == 1
    assert not ledger.exists()
