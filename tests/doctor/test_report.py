"""The report: one failing check stops no other, the JSON, what is examined when."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_plugin.doctor import Finding, Report, Severity, StepCost, examine_training
from retina_plugin.errors import ConfigError
from tests.doctor.examples import config, record

E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE


@pytest.fixture
def dataset():
    """Registers records under a name, until the test ends."""
    names = []

    def register(load, classes=("a", "b"), name="examples"):
        DatasetCatalog.register(name, load if callable(load) else lambda: load)
        MetadataCatalog.get(name).thing_classes = list(classes)
        names.append(name)
        return ("DATASETS.TRAIN", (name,), "MODEL.RETINANET.NUM_CLASSES", len(classes))

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


GOOD = [record([(32, 32, 64, 64), (40, 40, 90, 90)], classes=[0, 1]) for _ in range(12)]


def test_findings_of_a_check_that_raises_stay_and_name_it():
    def check():
        yield Finding(W, "x", "odd")
        raise KeyError("height")

    report = Report("c.yaml")
    report.run("sizes", check)
    report.run("others", lambda: [Finding(N, "y", "fine")])
    assert [(name, f.severity) for name, f in report.findings] == [
        ("sizes", W),
        ("sizes", E),
        ("others", N),
    ]
    error = report.findings[1][1]
    assert error.where == "sizes" and "KeyError: 'height'" in error.what
    assert "test_report.py, line " in error.what


def test_config_error_of_a_check_is_its_line():
    def check():
        raise ConfigError("train.json: is cut")

    report = Report("c.yaml")
    report.run("datasets", check)
    assert report.findings[0][1].what == "train.json: is cut"


def test_interruption_is_not_a_finding():
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Report("c.yaml").run("x", check)


def test_findings_are_sorted_and_counted():
    report = Report("c.yaml")
    report.run("x", lambda: [Finding(s, str(i), "z") for i, s in enumerate([N, W, E, W, N])])
    assert [f.where for _, f in report.sorted_findings()] == ["2", "1", "3", "0", "4"]
    assert report.summary() == "1 error, 2 warnings, 2 notes"


def test_same_finding_is_there_once():
    report = Report("c.yaml")
    for name in ("x", "y"):
        report.run(name, lambda: [Finding(E, "a", "b")])
    assert report.count(E) == 1


def test_json_has_everything(dataset):
    cost = StepCost(0.25, 2**30, 2**34, 16, 1, "cpu (1 threads)")
    report = Report("c.yaml", ("A", "1"))
    examine_training(config(*dataset(GOOD)), report, lambda: cost)
    content = json.loads(report.to_json())
    assert content["version"] == 1
    assert (content["config"], content["overrides"]) == ("c.yaml", ["A", "1"])
    assert set(content["counts"]) == {"error", "warning", "note"}
    assert sum(content["counts"].values()) == len(content["findings"]) > 3
    assert set(content["findings"][0]) == {"check", "severity", "where", "what", "fix"}
    assert [check["name"] for check in content["checks"]] == [
        "training set",
        "schedule",
        "mirrored classes",
        "classes",
        "anchors",
        "image size",
        "other anchors",
        "first loss",
        "one step",
    ]
    assert content["anchors"]["total"] == {"name": "all", "boxes": 24, "lower": 1, "upper": 1}
    assert content["anchors"]["sample"]["boxes"] == 24
    assert content["classes"][0] == {"name": "a", "boxes": 12, "images": 12}
    assert content["first_loss"]["prior"] == 0.01 and content["first_loss"]["total"] > 1
    assert content["step"]["seconds"] == 0.25 and content["suggestion"] is None


def test_suggestion_is_in_the_json(dataset):
    thin = [record([(10, 10, 140, 18)] * 2, name=f"{i}.jpg") for i in range(10)]
    report = Report("c.yaml")
    examine_training(config(*dataset(thin)), report)
    content = json.loads(report.to_json())
    assert "ASPECT_RATIOS" in content["suggestion"]["yaml"]
    assert any(check == "other anchors" for check, _ in report.findings)


def test_dataset_function_that_fails_is_an_error_and_leaves_the_schedule(dataset):
    def load():
        return {}["x"]

    report = Report("c.yaml")
    examine_training(config(*dataset(load)), report)
    assert report.count(E) == 1 and "KeyError" in report.findings[0][1].what
    assert "schedule" in report.seconds and "anchors" not in report.seconds


@pytest.mark.parametrize("records", [[], [record([])], [{}, None, {"annotations": 3}]], ids=str)
def test_no_boxes_no_anchor_fit(dataset, records):
    report = Report("c.yaml")
    examine_training(config(*dataset(records)), report)
    assert "anchors" not in report.seconds and report.count(E) == 0


def test_dataset_that_is_no_list_is_not_examined(dataset):
    report = Report("c.yaml")
    examine_training(config(*dataset(lambda: iter(GOOD))), report)
    assert report.findings[0][1].what == "is no list of records: its boxes are not examined"


def test_step_is_not_measured_after_an_error(dataset):
    report = Report("c.yaml")
    report.run("images", lambda: [Finding(E, "a.jpg", "is cut")])
    examine_training(config(*dataset(GOOD)), report, lambda: pytest.fail("it was"))


def test_impossible_keys_are_not_examined(dataset):
    report = Report("c.yaml")
    keys = ("SOLVER.BASE_LR", "MODEL.ANCHOR_GENERATOR.SIZES")
    report.run("keys", lambda: [Finding(E, key, "is impossible") for key in keys])
    examine_training(config(*dataset(GOOD)), report)
    assert list(report.seconds) == ["keys", "training set", "mirrored classes", "classes"]


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "MODEL.RETINANET.NUM_CLASSES"])
def test_anchors_are_examined_without_weights_and_with_another_number_of_classes(dataset, key):
    report = Report("c.yaml")
    report.run("keys", lambda: [Finding(E, key, "is wrong")])
    cfg = config(*dataset(GOOD), "MODEL.RETINANET.NUM_CLASSES", 80)
    examine_training(cfg, report)
    assert report.anchors is not None and report.loss is not None and report.count(E) == 1


def test_other_detectors_have_no_anchor_fit(dataset):
    report = Report("c.yaml")
    examine_training(config(*dataset(GOOD), "MODEL.META_ARCHITECTURE", "FCOS"), report)
    assert report.anchors is None and report.count(E) == 0
