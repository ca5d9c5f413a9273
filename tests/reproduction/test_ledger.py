"""The ledger's page shows every result, the spread of the seeds, and claims that do not hold."""

from reproduction import plan
from reproduction.ledger import LEDGER, Ledger
from reproduction.paper import Claim

MINI_TABLES = ("5.1", "1a", "1b", "1c", "1d", "3")


def result(row, ap, **more):
    metrics = {"AP": ap, "AP50": ap + 10, "AP75": ap - 5, "seconds": 90, "commit": "abc"}
    return {"rows": [row], "opts": [], **metrics, **more}


def page(tmp_path, results, claims=(), scale="mini"):
    ledger = Ledger(tmp_path / "ledger.json", claims)
    for number, one in enumerate(results):
        ledger.record(scale, f"key-seed{number}", one)
    return (tmp_path / "ledger.md").read_text()


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path):
    text = page(tmp_path, [result("1b gamma=2", 40.0), result("1b gamma=2", 43.0)])
    assert "| gamma=2 | 34.0 | 41.5 | +7.5 | 51.5 | 36.5 | 2 | 3.0 | 1.5 | abc |" in text
    assert "Table 1a" not in text  # has no result


def test_diverged_row_shows_the_iteration(tmp_path):
    diverged = {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7}
    text = page(tmp_path, [diverged])
    assert "| pi=0.5 | diverges | diverged at iteration 7 |" in text


def test_claims_hold_fail_or_diverge(tmp_path):
    rows = [
        result("1b gamma=2", 40.0),
        result("3 CE", 30.0, early_loss=2.0),
        result("3 FL", 35.0, early_loss=8.0),
        {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7},
    ]
    claims = [
        Claim("holds", "1b gamma=2", ("3 CE",)),
        Claim("fails", "3 CE", ("3 FL",), note="too short"),
        Claim("gone", "3 CE", ("5.1 pi=0.5",)),
        Claim("close", "3 FL", ("1b gamma=2",), within=1),
        Claim("calm", "3 CE", ("3 FL",), measure="early_loss"),
        Claim("best of", "3 FL", ("3 CE", "1b gamma=2", "1a alpha=0.5")),
        Claim("not measured", "1a alpha=0.5", ("3 FL",)),
    ]
    text = page(tmp_path, rows, claims)
    assert "| holds | 1b gamma=2: 40.0 | 3 CE: 30.0 | yes: +10.0 |" in text
    assert "| fails | 3 CE: 30.0 | 3 FL: 35.0 | **no**: -5.0 |" in text
    assert "- fails: too short" in text
    assert "| gone | 3 CE: 30.0 | 5.1 pi=0.5: diverged | yes: the other diverged |" in text
    assert "| close | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 (within 1) |" in text
    assert "| calm | 3 CE: early loss 2.0 | 3 FL: early loss 8.0 | yes: 4x |" in text
    assert "| best of | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 |" in text
    assert "not measured" not in text


def test_difference_within_the_spread_is_marked(tmp_path):
    rows = [result("3 FL", 40.0), result("3 FL", 36.0), result("3 CE", 37.0)]
    claims = [Claim("doubtful", "3 FL", ("3 CE",))]
    assert "yes: +1.0, within the seeds' spread" in page(tmp_path, rows, claims)


def test_results_are_kept_on_disk_and_get_more_rows(tmp_path):
    page(tmp_path, [result("3 FL", 40.0)])
    again = Ledger(tmp_path / "ledger.json")
    again.add_rows("mini", "key-seed0", ["1b gamma=2"])
    assert Ledger(again.path).runs("mini")["key-seed0"]["rows"] == ["1b gamma=2", "3 FL"]
    assert "| gamma=2 | 34.0 | 40.0 |" in again.path.with_suffix(".md").read_text()


def test_the_repositorys_ledger_has_the_keys_and_overrides_that_are_planned():
    """Otherwise reproduce would train rows again that the ledger has."""
    results = Ledger().runs("mini")
    seeds = max(int(key.rpartition("-seed")[2]) for key in results)
    rows = plan.select_rows(MINI_TABLES, [])
    runs = {run.key: run for run in plan.plan(rows, "mini", seeds)}
    for key, recorded in results.items():
        assert (recorded["rows"], recorded["opts"]) == (runs[key].rows, runs[key].opts)


def test_the_repositorys_page_is_written_from_its_ledger(tmp_path):
    (tmp_path / "ledger.json").write_text(LEDGER.read_text())
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.write_page()
    assert (tmp_path / "ledger.md").read_text() == LEDGER.with_suffix(".md").read_text()
