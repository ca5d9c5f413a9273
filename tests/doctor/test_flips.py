"""Classes whose names say that a mirrored object is another one."""

import pytest
from detectron2.data import MetadataCatalog

from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.flips import flip_findings
from tests.doctor.examples import config

W, N = Severity.WARNING, Severity.NOTE


def found(names, flip="horizontal"):
    findings = list(flip_findings(config("INPUT.RANDOM_FLIP", flip), names))
    assert all(f.where == "INPUT.RANDOM_FLIP" and "none" in f.fix for f in findings)
    return [(f.severity, f.what) for f in findings]


@pytest.mark.parametrize(
    "names",
    [
        ["left hand", "right hand"],
        ["turn_left", "turn_right"],
        ["TurnLeft", "TurnRight"],
        ["LEFT-TURN", "RIGHT-TURN"],
        ["leftarrow", "rightarrow"],
        ["hand_L", "hand_R"],
        ["clockwise", "counterclockwise"],
        ["wing port", "wing starboard"],
        ["Hand links", "Hand rechts"],
        ["main gauche", "main droite"],
        ["左手", "右手"],
    ],
    ids=str,
)
def test_mirrored_pairs(names):
    ((severity, what),) = found([*names, "car"])
    assert severity is W
    assert f"'{names[0]} / {names[1]}' are each other's mirror image" in what


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["keep left", "car"], "'keep left' name a direction"),
        (["up arrow", "car"], "'up arrow' name a direction"),
        ([str(d) for d in range(10)], "'0', '1', '2', '3' and 6 more are digits"),
        (["one", "two", "three", "four"], "are digits"),
        (["A", "b", "C"], "'A', 'b', 'C' are letters"),
        (["letter A", "letter B", "letter C"], "are letters"),
        (["Я", "Ж", "Щ"], "are letters"),
    ],
    ids=str,
)
def test_directions_digits_and_letters(names, what):
    findings = found(names)
    assert [severity for severity, _ in findings] == [W]
    assert findings[0][1].endswith(what)


@pytest.mark.parametrize("name", ["text", "license plate", "handwriting", "speed limit 30"])
def test_text_is_worth_a_note(name):
    assert [severity for severity, _ in found([name, "car"])] == [N]


@pytest.mark.parametrize(
    "names",
    [
        MetadataCatalog.get("coco_2017_train").thing_classes,
        ["car", "leftover", "sparrow", "copyright"],
        ["type 1", "type 2"],
        ["links", "buttons"],
        ["a", "person"],
        ["vitamin A", "hepatitis B", "plan C"],
        [""],
        [],
    ],
    ids=lambda names: str(names[:3]),
)
def test_other_classes_are_no_finding(names):
    assert found(names) == []


def test_vertical_flips():
    assert found(["thumb up", "thumb down"], "vertical")[0][0] is W
    assert found(["top shelf", "bottom shelf"], "vertical")[0][0] is W
    assert found(["top shelf", "bottom shelf"]) == []
    assert found(["left hand", "right hand"], "vertical") == []
    assert found(["6", "9"], "vertical")[0][0] is W


def test_no_flip_no_finding():
    assert found(["left", "right"], "none") == []
