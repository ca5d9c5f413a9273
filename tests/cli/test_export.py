"""``retina export``: its arguments."""

import pytest

from retina_plugin.cli import export
from retina_plugin.errors import ConfigError


@pytest.fixture
def calls(monkeypatch):
    """The calls of ``export_model``."""
    found = []
    monkeypatch.setattr(export, "export_model", lambda *a, **k: found.append((a, k)))
    return found


def test_arguments_are_passed_on(calls, capsys):
    """Overrides of the config may stand anywhere."""
    words = "--config-file a.yaml --weights w.pth --output m.onnx --output-stage boxes --overwrite"
    images = ["--images", "x", "--images", "y"]
    export.main([*words.split(), *images, "TEST.DETECTIONS_PER_IMAGE", "9"])
    ((positional, named),) = calls
    assert positional == ("a.yaml", "w.pth", "m.onnx")
    assert named["stage"] == "boxes" and named["overwrite"] and named["images"] == ["x", "y"]
    assert named["opts"] == ["TEST.DETECTIONS_PER_IMAGE", "9"]
    assert capsys.readouterr().out.split() == ["Exported", "m.onnx"]


@pytest.mark.parametrize(
    ("output", "kind", "expected"),
    [
        ("m", "onnx", "m.onnx"),
        ("m.v2", "pt2", "m.v2.pt2"),
        ("m.xml", "openvino", "m.xml"),
        ("m.ONNX", "onnx", "m.ONNX"),
        ("m.pt2", None, "m.pt2"),
    ],
)
def test_format_completes_the_name(calls, output, kind, expected):
    given = ["--format", kind] if kind else []
    export.main(["--config-file", "a", "--weights", "w", "--output", output, *given])
    assert calls[0][0][2] == expected


def test_format_and_name_that_disagree_are_refused(calls):
    with pytest.raises(ConfigError, match=r"m.pt2 is a file of pt2, --format says onnx"):
        export.main(
            ["--config-file", "a", "--weights", "w", "--output", "m.pt2", "--format", "onnx"]
        )
    assert not calls


@pytest.mark.parametrize("words", ["", "--config-file a --model b", "--model b --weights c"])
def test_model_is_named_once(words, capsys):
    with pytest.raises(SystemExit):
        export.main(["--output", "m.onnx", *words.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "give --config-file and --weights, or --model" in error or "brings its weights" in error


def test_page_that_cannot_be_written_is_refused_before_the_export(calls, tmp_path):
    """An export takes minutes."""
    (tmp_path / "file").write_text("")
    words = ["--config-file", "a", "--weights", "w", "--output", str(tmp_path / "m.onnx"), "--page"]
    second, web = str(tmp_path / "second.onnx"), str(tmp_path / "web.tgz")
    for given, line in [
        ([str(tmp_path / "file" / "site")], "--page: .*file is a file"),
        ([str(tmp_path / "site"), "--page-second", second], "second.onnx does not exist"),
        ([str(tmp_path / "site"), "--onnxruntime-web", web], "web.tgz does not exist"),
    ]:
        with pytest.raises(ConfigError, match=line):
            export.main([*words, *given])
    assert not calls and not (tmp_path / "site").exists()


def test_options_of_a_page_need_one(calls, capsys):
    words = "--config-file a --weights w --output m.onnx --page-second n.onnx"
    with pytest.raises(SystemExit):
        export.main(words.split())
    assert "--page-second and --onnxruntime-web are for --page DIR" in capsys.readouterr().err
    assert not calls


def test_folder_is_no_output(calls, tmp_path):
    for output in (str(tmp_path), "new/"):
        with pytest.raises(ConfigError, match="is a folder: name a file"):
            export.main(["--config-file", "a", "--weights", "w", "--output", output])
    assert not calls
