"""The page shows every result, the seeds' spread, and claims that do not hold."""

import json

from reproduction import ledger as ledger_module
from reproduction.ledger import Ledger


def result(row, ap, **more):
    metrics = {"AP": ap, "AP50": ap + 10, "AP75": ap - 5, "seconds": 90, "commit": "abc"}
    return {"rows": [row], "opts": [], **metrics, **more}


def page(tmp_path, monkeypatch, results, claims=(), scale="mini"):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "paper.yaml").write_text(json.dumps({"claims": list(claims)}))
    monkeypatch.setattr(ledger_module, "checkout", lambda: tmp_path)
    ledger = Ledger(tmp_path / "docs" / "ledger.json")
    for number, one in enumerate(results):
        ledger.record(scale, f"key-seed{number}", one)
    return (tmp_path / "docs" / "ledger.md").read_text()


def test_seeds_are_averaged_and_their_spread_shown(tmp_path, monkeypatch):
    text = page(tmp_path, monkeypatch, [result("1b gamma=2", 40.0), result("1b gamma=2", 43.0)])
    assert "| gamma=2 | 34.0 | 41.5 | +7.5 | 51.5 | 36.5 | 2 | 3.0 | 1.5 | abc |" in text
    assert "Table 1a" not in text  # has no result


def test_a_row_that_diverged_says_where(tmp_path, monkeypatch):
    diverged = {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7}
    text = page(tmp_path, monkeypatch, [diverged])
    assert "| pi=0.5 | diverges | diverged at iteration 7 |" in text


def test_claims_that_hold_that_do_not_and_that_diverged(tmp_path, monkeypatch):
    rows = [
        result("1b gamma=2", 40.0),
        result("3 CE", 30.0, early_loss=2.0),
        result("3 FL", 35.0, early_loss=8.0),
        {"rows": ["5.1 pi=0.5"], "opts": [], "commit": "abc", "diverged_at": 7},
    ]
    claims = [
        {"text": "holds", "better": "1b gamma=2", "worse": "3 CE"},
        {"text": "fails", "better": "3 CE", "worse": "3 FL", "note": "too short"},
        {"text": "gone", "better": "3 CE", "worse": "5.1 pi=0.5"},
        {"text": "close", "better": "3 FL", "worse": "1b gamma=2", "within": 1},
        {"text": "calm", "better": "3 CE", "worse": "3 FL", "measure": "early_loss"},
        {"text": "best of", "better": "3 FL", "worse": ["3 CE", "1b gamma=2", "1a alpha=0.5"]},
        {"text": "not measured", "better": "1a alpha=0.5", "worse": "3 FL"},
    ]
    text = page(tmp_path, monkeypatch, rows, claims)
    assert "| holds | 1b gamma=2: 40.0 | 3 CE: 30.0 | yes: +10.0 |" in text
    assert "| fails | 3 CE: 30.0 | 3 FL: 35.0 | **no**: -5.0 |" in text
    assert "- fails: too short" in text
    assert "| gone | 3 CE: 30.0 | 5.1 pi=0.5: diverged | yes: the other diverged |" in text
    assert "| close | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 (within 1) |" in text
    assert "| calm | 3 CE: early loss 2.0 | 3 FL: early loss 8.0 | yes: 4x |" in text
    assert "| best of | 3 FL: 35.0 | 1b gamma=2: 40.0 | **no**: -5.0 |" in text
    assert "not measured" not in text


def test_a_difference_within_the_spread_says_so(tmp_path, monkeypatch):
    rows = [result("3 FL", 40.0), result("3 FL", 36.0), result("3 CE", 37.0)]
    claims = [{"text": "doubtful", "better": "3 FL", "worse": "3 CE"}]
    assert "yes: +1.0, within the seeds' spread" in page(tmp_path, monkeypatch, rows, claims)


def test_results_are_kept_on_disk_and_rows_can_be_added(tmp_path, monkeypatch):
    page(tmp_path, monkeypatch, [result("3 FL", 40.0)])
    again = Ledger(tmp_path / "docs" / "ledger.json")
    again.add_rows("mini", "key-seed0", ["1b gamma=2"])
    assert Ledger(again.path).runs("mini")["key-seed0"]["rows"] == ["1b gamma=2", "3 FL"]
    assert "| gamma=2 | 34.0 | 40.0 |" in again.path.with_suffix(".md").read_text()
