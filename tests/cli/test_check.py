"""``retina check``: its arguments."""

import pytest

from retina_plugin.cli import check
from retina_plugin.deploy.check import ApComparison

FOUND = ApComparison("digits_dev", 1200, {"AP": 40.0}, {"AP": 39.5}, 30.0, 10.0)


@pytest.fixture
def calls(monkeypatch):
    """The calls of ``check_file``."""
    found = []

    def record(*args, **options):
        found.append((args, options))
        return FOUND

    monkeypatch.setattr(check, "check_file", record)
    return found


def test_arguments_are_passed_on(calls, capsys):
    words = "m.onnx --config-file a.yaml --weights w.pth --dataset d --limit 9 --output r.json"
    check.main([*words.split(), "TEST.DETECTIONS_PER_IMAGE", "9"])
    ((positional, named),) = calls
    assert positional == ("m.onnx", "a.yaml", "w.pth")
    assert named == {
        "dataset": "d",
        "images": 9,
        "output": "r.json",
        "opts": ["TEST.DETECTIONS_PER_IMAGE", "9"],
    }
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "1,200 images of digits_dev"
    assert "difference  -0.50  3.00x" in printed and "r.json" in printed


@pytest.mark.parametrize("words", ["", "--config-file a --model b", "--model b --weights c"])
def test_model_is_named_once(words, capsys):
    with pytest.raises(SystemExit):
        check.main(["m.onnx", *words.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "give --config-file and --weights, or --model" in error or "brings its weights" in error
