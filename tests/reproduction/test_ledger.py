"""The ledger's page shows every result, its interval, and claims that do not hold."""

import json
import re

import numpy as np

from reproduction import plan
from reproduction.intervals import RESAMPLES, SeedSpread, interval
from reproduction.ledger import LEDGER, Ledger
from reproduction.paper import Claim


def result(row, ap, **more):
    metrics = {"AP": ap, "AP50": ap + 10, "AP75": ap - 5, "seconds": 90, "commit": "abc"}
    return {"rows": [row], "opts": [], **metrics, **more}


def page(tmp_path, results, claims=(), scale="mini"):
    ledger = Ledger(tmp_path / "ledger.json", claims)
    rows = {str(row): row for row in plan.select_rows(["all"], [])}
    for seed, one in enumerate(results):
        key = plan.row_key(rows[one["rows"][0]], scale, one.get("set", ()), seed)
        ledger.record(scale, key, one)
    return (tmp_path / "ledger.md").read_text()


def resampled(ap, spread=1.0):
    """AP on resamples whose images are of different hardness, evenly around ``ap``."""
    return list(ap + spread * np.linspace(-2, 2, RESAMPLES))


def test_seeds_are_averaged(tmp_path):
    text = page(tmp_path, [result("1b gamma=2", 40.0), result("1b gamma=2", 43.0)])
    assert "| gamma=2 | 34.0 | 41.5 |  | 51.5 | 36.5 | 2 | 1.5 | abc |" in text
    assert "Table 1a" not in text  # has no result


def test_interval_is_that_of_images_and_seeds(tmp_path):
    one = [result("1b gamma=2", 40.0, resampled_AP=resampled(40.0))]
    low, high = interval([resampled(40.0)], 40.0, SeedSpread())
    assert 4 < high - low < 5 and f"| 40.0 | {low:.1f} to {high:.1f} |" in page(tmp_path, one)
    two = [*one, result("1b gamma=2", 44.0, resampled_AP=resampled(44.0))]
    low, high = interval([r["resampled_AP"] for r in two], 42.0, SeedSpread(8.0, 1))
    assert high - low > 6
    assert f"| 42.0 | {low:.1f} to {high:.1f} |" in page(tmp_path, two)


def test_run_with_other_settings_is_no_result_of_the_row(tmp_path):
    """It has a table of its own."""
    more = result("1b gamma=2", 50.0, set=["MODEL.RETINANET.NUM_CLASSES", "80"])
    text = page(tmp_path, [result("1b gamma=2", 40.0), more])
    assert "| gamma=2 | 34.0 | 40.0 |" in text
    assert "| `MODEL.RETINANET.NUM_CLASSES 80` | 1b gamma=2 | 50.0 |  | 60.0 | 45.0 | 1 |" in text


def test_run_of_changed_configs_is_no_result_of_the_row(tmp_path):
    """As after a change of mini.yaml: its AP is not averaged with that of the new runs."""
    page(tmp_path, [result("1b gamma=2", 40.0)])
    ledger = Ledger(tmp_path / "ledger.json", [])
    ledger.record("mini", "0123456789-seed1", result("1b gamma=2", 50.0))
    text = (tmp_path / "ledger.md").read_text()
    assert "| gamma=2 | 34.0 | 40.0 |" in text
    assert "| earlier configs | 1b gamma=2 | 50.0 |" in text


def test_each_run_is_one_line_of_the_file(tmp_path):
    page(tmp_path, [result("1b gamma=2", 40.0, resampled_AP=resampled(40.0)), result("3 FL", 1.0)])
    text = (tmp_path / "ledger.json").read_text()
    assert len(text.splitlines()) == 6 and len(json.loads(text)["mini"]) == 2


def test_diverged_row_shows_the_iteration(tmp_path):
    diverged = {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7}
    text = page(tmp_path, [diverged])
    assert "| pi=0.5 | diverges | diverged at iteration 7 |" in text


def verdicts(text):
    """Claim -> its last cell, of a page."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[-1] for cells in rows}


def test_claims_hold_fail_or_diverge(tmp_path):
    diverged = {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7}
    rows = [
        result("1b gamma=2", 40.0),
        result("3 CE", 30.0, early_loss=2.0),
        result("3 FL", 35.0, early_loss=8.0),
        diverged,
    ]
    claims = [
        Claim("holds", "1b gamma=2", ("3 CE",), note="not printed"),
        Claim("fails", "3 CE", ("3 FL",), note="too short"),
        Claim("gone", "3 CE", ("5.1 pi=0.5",)),
        Claim("close", "3 FL", ("1b gamma=2",), within=1),
        Claim("calm", "3 CE", ("3 FL",), measure="early_loss"),
        Claim("best of", "3 FL", ("3 CE", "1b gamma=2", "1a alpha=0.5")),
        Claim("not measured", "1a alpha=0.5", ("3 FL",)),
    ]
    resamples = [{**r, "resampled_AP": resampled(r["AP"])} for r in rows[:3]]
    text = page(tmp_path, 2 * [*resamples, diverged], claims)
    assert "| holds | 1b gamma=2: 40.0 | 3 CE: 30.0 | yes: +10.0 [+10.0, +10.0] |" in text
    assert "| fails | 3 CE: 30.0 | 3 FL: 35.0 | **no**: -5.0 [-5.0, -5.0] |" in text
    assert "- fails: too short" in text and "not printed" not in text
    assert "| gone | 3 CE: 30.0 | 5.1 pi=0.5: diverged | yes: the other diverged |" in text
    assert (
        "| close | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 [-5.0, -5.0] (within 1) |" in text
    )
    assert "| 3 CE: early loss 2.0 | 3 FL: early loss 8.0 | yes: 4.0 times as large |" in text
    assert "| best of | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 [-5.0, -5.0] |" in text
    assert "not measured" not in text


def test_doubts_are_named(tmp_path):
    """Results without resamples, with one seed, or of which some diverged are never clear."""
    gone = {"rows": ["3 CE"], "opts": [], "commit": "abc", "diverged_at": 7}
    both = [result(row, ap, resampled_AP=resampled(ap)) for row, ap in [("3 FL", 50), ("3 CE", 30)]]
    claim = Claim("x", "3 FL", ("3 CE",))

    def verdict(name, *results):
        return verdicts(page(tmp_path / name, results, [claim]))["x"]

    assert verdict("a", *both) == "yes: +20.0 [+20.0, +20.0], one seed"
    assert verdict("b", *both, *both, gone) == (
        "yes: +20.0 [+20.0, +20.0], 1 of 3 seeds of 3 CE diverged"
    )
    plain = [result("3 FL", 50.0), result("3 CE", 30.0)]
    assert verdict("c", *plain, *plain) == "yes: +20.0, no interval"
    assert verdict("d", result("3 FL", 50.0), gone) == "yes: the other diverged, one seed"


def test_equal_runs_do_not_differ_by_chance(tmp_path):
    rows = [result(row, 30.0, resampled_AP=resampled(30.0)) for row in ("3 FL", "3 CE")]
    claims = [Claim("x", "3 FL", ("3 CE",), note="why"), Claim("y", "3 FL", ("3 CE",), within=2)]
    text = page(tmp_path / "a", [*rows, *rows], claims)
    assert verdicts(text)["x"] == "**no**: the runs are equal"
    assert verdicts(text)["y"] == "yes: the runs are equal"
    assert "- x: why" in text and "- y" not in text
    assert verdicts(page(tmp_path / "b", rows, claims))["x"].endswith("equal, one seed")


def test_difference_whose_interval_has_0_is_not_clear(tmp_path):
    def row(name, ap, **more):
        return result(name, ap, resampled_AP=resampled(ap, **more))

    means = {"3 FL": 38.0, "3 CE": 37.0, "1b gamma=5": 20.0, "1b gamma=0": 37.5}
    means |= {"1b gamma=0.1": 30.0, "1b gamma=0.2": 30.0, "1b gamma=0.5": 30.0}  # say what is usual
    rows = [row(name, mean + seed) for name, mean in means.items() for seed in (-0.4, 0.4)]
    rows.append(row("1b gamma=1", 50.0))
    claims = [
        Claim("doubtful", "3 FL", ("3 CE",)),
        Claim("clear", "3 FL", ("1b gamma=5",)),
        Claim("clearly wrong", "1b gamma=5", ("3 FL",)),
        Claim("about equal", "1b gamma=0", ("3 CE",), within=2),
        Claim("perhaps equal", "3 FL", ("3 CE",), within=2),
        Claim("not equal", "1b gamma=5", ("3 CE",), within=2),
        Claim("too few", "1b gamma=1", ("3 CE",)),
    ]
    found = verdicts(page(tmp_path, rows, claims))
    assert re.fullmatch(r"not clear: \+1\.0 \[-\d\.\d, \+\d\.\d\]", found["doubtful"])
    assert re.fullmatch(r"yes: \+18\.0 \[\+1\d\.\d, \+\d+\.\d\]", found["clear"])
    assert re.fullmatch(r"\*\*no\*\*: -18\.0 \[-\d+\.\d, -1\d\.\d\]", found["clearly wrong"])
    assert re.fullmatch(r"yes: \+0\.5 \[-0\.\d, \+1\.\d\] \(within 2\)", found["about equal"])
    assert re.fullmatch(r"not clear: \+1\.0 .* \(within 2\)", found["perhaps equal"])
    assert re.fullmatch(r"yes: \+13\.0 \[\+1\d\.\d, \+1\d\.\d\], one seed", found["too few"])
    assert re.fullmatch(r"\*\*no\*\*: -17\.0 .* \(within 2\)", found["not equal"])


def test_results_are_kept_on_disk_and_get_more_rows(tmp_path):
    page(tmp_path, [result("3 FL", 40.0)])
    again = Ledger(tmp_path / "ledger.json")
    (key,) = again.runs("mini")
    again.add_rows("mini", key, ["1b gamma=2"])
    assert Ledger(again.path).runs("mini")[key]["rows"] == ["1b gamma=2", "3 FL"]
    assert "| gamma=2 | 34.0 | 40.0 |" in again.path.with_suffix(".md").read_text()


def test_the_repositorys_ledger_has_the_keys_and_overrides_that_are_planned():
    """Otherwise reproduce would train rows again that the ledger has."""
    results = Ledger().runs("mini")
    seeds = max(int(key.rpartition("-seed")[2]) for key in results)
    rows = plan.select_rows(plan.MINI_TABLES, [])
    planned = {}
    for extra in {tuple(recorded.get("set", ())) for recorded in results.values()}:
        of_row = [plan.plan([row], "mini", seeds, extra) for row in rows]
        planned[extra] = [run for runs in of_row for run in runs]
    for key, recorded in results.items():
        extra = tuple(recorded.get("set", ()))
        same = [run for run in planned[extra] if run.key == key]
        of_run, asked = {run.rows[0] for run in same}, set(recorded["rows"])
        assert asked == of_run if not extra else asked <= of_run  # --set may be for some rows
        # those of the row that was asked for first
        assert recorded["opts"] in [run.opts for run in same if run.rows[0] in asked]


def test_the_repositorys_page_is_written_from_its_ledger(tmp_path):
    (tmp_path / "ledger.json").write_text(LEDGER.read_text())
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.write_page()
    assert (tmp_path / "ledger.md").read_text() == LEDGER.with_suffix(".md").read_text()
