"""The page that shows the paper's claims: drawn from the ledger and from the runs' folders."""

import json
import re

import pytest
import torch
from detectron2.modeling import build_model

from reproduction import evidence
from reproduction.claims import Judgement, judged, paper_difference
from reproduction.ledger import Ledger
from reproduction.paper import Claim, load_claims
from reproduction.plan import MINI_DATASET, MINI_TABLES, plan, select_rows
from retina_plugin.data import register_datasets
from retina_plugin.doctor import dataset_records


def judgement(holds, clear):
    return Claim("x", "3 FL", ("3 CE",)), Judgement(("a", "b"), holds, clear, "yes")


def test_summary_counts_what_shows():
    found = [judgement(True, True)] * 3 + [judgement(True, False), judgement(False, False)]
    found.append(judgement(False, True))
    counts = "3 show, 1 do not, and 2 are not clear"
    assert f"Of 6 orderings that the paper reports, {counts}" in evidence.summary(found, 6)
    text = evidence.summary(found, 14)
    assert f"reports, 6 have been measured so far. Of these, {counts}" in text


def test_paper_difference_is_that_of_the_best_of_the_others():
    of = {claim.text.partition(" (")[0]: paper_difference(claim) for claim in load_claims()}
    assert of["FL beats the best CE"] == pytest.approx(34.0 - 31.1)
    assert of["FL beats the best OHEM"] == pytest.approx(36.0 - 32.8)
    assert of["pi = .01 trains, pi = .5 diverges or is worse"] is None
    assert of["pi = .5 makes the early loss large"] is None


@pytest.fixture
def folder(tiny_sparse, tiny_cfg, tmp_path):
    """What a run leaves: its config, weights, losses and detections, some of them right."""
    register_datasets([MINI_DATASET])
    tiny_cfg.DATASETS.TEST = (MINI_DATASET,)
    folder = tmp_path / "run"
    predictions = folder / "inference" / MINI_DATASET / "coco_instances_results.json"
    predictions.parent.mkdir(parents=True)
    (folder / "config.yaml").write_text(tiny_cfg.dump())
    torch.save({"model": build_model(tiny_cfg).state_dict()}, folder / "model_final.pth")
    losses = [{"iteration": i, "total_loss": 2 / i, "loss_cls": 1 / i} for i in (1, 20, 40)]
    (folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in losses))
    found = []
    for number, record in enumerate(dataset_records(MINI_DATASET)):
        for one in record["annotations"]:
            result = {"image_id": record["image_id"], "category_id": one["category_id"] + 1}
            found.append({**result, "bbox": one["bbox"], "score": 0.9 / (1 + number)})
    found.append({**found[-1], "bbox": [0, 0, 5, 5], "score": 0.95})
    predictions.write_text(json.dumps(found))
    return folder


def test_page_has_pictures_and_measured_numbers(folder, tmp_path):
    fails = Claim("fails", "1b gamma=5", ("1b gamma=2",), note="too short")
    ledger = Ledger(tmp_path / "ledger.json", [*load_claims(), fails])
    runs = plan(select_rows(["1b"], ["gamma=2", "gamma=5"]), "mini", 1)
    for run, ap in zip(runs, (40.0, 30.0)):
        more = {"AP50": 50.0, "AP75": 30.0, "seconds": 60, "commit": "abc"}
        ledger.record("mini", run.key, {"rows": run.rows, "opts": [], "AP": ap, **more})
    page = tmp_path / "docs" / "evidence.md"
    text = evidence.page(ledger, dict.fromkeys(evidence._SHOWN, folder), page)
    assert re.search(r"\| gamma 2 beats gamma 5 .*\| yes: \+10\.0, one seed, no interval *\|", text)
    assert "\n\n- fails: too short\n\n## " in text
    pictures = re.findall(r"\]\((images/.*?)\)", text)
    assert len(pictures) == 4
    for name in pictures:
        assert (page.parent / name).stat().st_size > 10_000
    # every object is found with the right class; one detection is wrong, and scored the highest
    (recall,) = {line.split("|")[4].strip() for line in text.splitlines() if "CE, α" in line}
    assert recall == "1.000"


def test_only_what_is_missing_is_trained(tmp_path, monkeypatch, capsys):
    """All runs without a ledger; with it, the four of the pictures, whose results stay."""
    ledger = tmp_path / "ledger.json"
    where = ["--ledger", str(ledger), "--output", str(tmp_path / "runs")]
    runs = plan(select_rows(MINI_TABLES, []), "mini", 2)
    assert evidence.main([*where, "--dry-run"]) == 0
    assert f"{len(runs)} runs to train" in capsys.readouterr().out

    results = {run.key: {"rows": run.rows[:1], "opts": run.opts, "commit": "a"} for run in runs}
    ledger.write_text(json.dumps({"mini": {k: {**r, "AP": 1.0} for k, r in results.items()}}))
    trained = []
    monkeypatch.setattr(evidence, "execute", lambda runs, *rest: trained.extend(runs))
    monkeypatch.setattr(evidence, "page", lambda *args: "the page")
    monkeypatch.setattr(Ledger, "write_page", lambda self: None)
    page = tmp_path / "evidence.md"
    assert evidence.main([*where, "--page", str(page)]) == 0
    assert page.read_text() == "the page"
    assert len(trained) == 4 and all(run.key.endswith("-seed1") for run in trained)
    assert ["1b gamma=2", "1c 3x3", "1d FL", "3 FL"] in [run.rows for run in trained]
    recorded = json.loads(ledger.read_text())["mini"]
    assert {k: sorted(r["rows"]) for k, r in recorded.items()} == {
        run.key: sorted(run.rows) for run in runs
    }


def test_interrupted_run_is_finished_before_its_curve_is_drawn(tmp_path, capsys):
    """A run that the ledger has, but whose folder is another's or was deleted."""
    runs = {row: run for run in plan(select_rows(["5.1"], []), "mini", 1) for row in run.rows}
    result = {"opts": [], "commit": "a"}
    ended = {runs["5.1 pi=0.01"].key: {**result, "rows": ["5.1 pi=0.01"], "AP": 1.0}}
    gone = {runs["5.1 pi=0.5"].key: {**result, "rows": ["5.1 pi=0.5"], "diverged_at": 60}}
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps({"mini": {**ended, **gone}}))
    for key in (*ended, *gone):
        folder = tmp_path / "runs" / "mini" / key
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"iteration": 59, "loss_cls": 1.0}\n')
    where = ["--ledger", str(ledger), "--output", str(tmp_path / "runs")]
    assert evidence.main([*where, "--seeds", "1", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert all(key in listed for key in ended) and not any(key in listed for key in gone)


def test_the_repositorys_page_has_the_verdicts_of_its_ledger():
    text = evidence.PAGE.read_text(encoding="utf-8")
    ledger = Ledger()
    found = list(judged(ledger.claims, ledger.by_row("mini")))
    assert evidence.summary(found, len(ledger.claims)) in text.replace("\n", " ")
    for claim, one in found:
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {claim.text} ")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [*one.rows, one.verdict]
