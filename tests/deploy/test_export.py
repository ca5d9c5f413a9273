"""From a config and weights to a file that was compared, or to none."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retina_plugin.deploy import export, export_model, load_exported, parity, standalone
from retina_plugin.deploy.export import report_path
from retina_plugin.errors import ConfigError
from tests.deploy.echo import write_echo


@pytest.fixture
def weights(detector, tmp_path):
    """Of the fixture ``detector``'s model."""
    path = tmp_path / "weights.pth"
    torch.save({"model": detector()[1].state_dict(), "class_names": list("abcdefghij")}, path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with an image, one that is none, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 80)).save(folder / "b.png")
    (folder / "a.png").write_bytes(b"none")
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.mark.slow
def test_written_file_was_compared(detector, weights, photos, tmp_path, log):
    """The report lies beside it, and says of every size how equal it is."""
    output = tmp_path / "new" / "model.pt2"
    cfg, _ = detector("TEST.AUG.ENABLED", "True", "MODEL.COMPILE", "True")
    written = export_model(cfg, weights, output, stage="head", images=[str(photos)])
    assert written.path == output
    assert load_exported(output).metadata == written.metadata
    assert written.metadata.class_names == tuple("abcdefghij")
    report = json.loads(report_path(output).read_text())
    assert (report["compared"], report["quantized"], report["ap"]) == ("float32", "", None)
    report = report["batches"]
    assert report == [json.loads(json.dumps(x.to_dict())) for x in written.parity]
    assert len(report) == 6 and all(x["differences"]["logits"] < 1e-5 for x in report)
    assert sorted(x.name for x in output.parent.iterdir()) == ["model.pt2", "model.pt2.parity.json"]
    warnings = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert "TEST.AUG.ENABLED: the file detects in one view; call it for each view" in warnings

    with pytest.raises(ConfigError, match=r"model.pt2 is there already: --overwrite replaces it"):
        export_model(cfg, weights, output, images=[str(photos)])


@pytest.mark.slow
def test_report_of_a_quantized_file_says_what_was_compared(
    detector, weights, photos, tiny_digits, tmp_path, monkeypatch, log
):
    """The float32 file was. Of the quantized one there is the AP, if it has detections."""
    monkeypatch.setitem(parity.compare.__kwdefaults__, "seconds", 0.0)
    for stage in ("nms", "head"):
        output = tmp_path / f"{stage}.onnx"
        cfg, _ = detector("DATASETS.TEST", "('digits_scenes_val',)")
        options = {"stage": stage, "quantize": "fp16", "images": [str(photos)]}
        written = export_model(cfg, weights, output, **options)
        report = json.loads(report_path(output).read_text())
        assert (report["compared"], report["quantized"]) == ("float32", "fp16")
        assert report["batches"] == [json.loads(json.dumps(x.to_dict())) for x in written.parity]
        assert (report["ap"] is None) == (written.ap is None) == (stage == "head")
    assert json.loads((tmp_path / "nms.onnx.parity.json").read_text())["ap"]["images"] == 4
    lines = [r.message for r in log.records]
    assert sum("the float32 file, before it is quantized" in line for line in lines) == 2
    assert [r.message for r in log.records if r.levelno == logging.WARNING][-1] == (
        "the fp16 file was not compared with the model: in the stage head it has no AP"
    )


@pytest.fixture
def _instant(monkeypatch):
    """An export whose file is another one, and is not compared: that takes long."""
    equal = parity.Parity(1, 64, 96, 1, 1, {"boxes": 0.0, "scores": 0.0}, 1.0, 1.0, "")
    monkeypatch.setattr(export, "write_exported", lambda dense, metadata, path: write_echo(path))
    monkeypatch.setattr(export, "compare", lambda *args, **options: [equal])


@pytest.mark.usefixtures("_instant")
def test_edited_standalone_is_kept(detector, weights, photos, tmp_path, log):
    """Another program always is; an edited copy of ours unless --overwrite is given."""
    copy, output = tmp_path / "standalone.py", tmp_path / "model.onnx"
    ours = Path(standalone.__file__).read_text("utf-8")

    def after(before, overwrite):
        output.unlink(missing_ok=True)
        log.clear()
        if before is not None:
            copy.write_text(before, "utf-8")
        options = {"images": [str(photos)], "overwrite": overwrite}
        export_model(detector()[0], weights, output, **options)
        lines = [r.message for r in log.records if r.levelno == logging.WARNING]
        return copy.read_text("utf-8"), lines

    assert after(None, False) == after(ours, False) == (ours, [])
    edited = ours + "# mine\n"
    text, lines = after(edited, False)
    assert text == edited and "--overwrite replaces it" in lines[0]
    assert after(edited, True)[0] == ours
    for overwrite in (False, True):
        assert after("print(1)\n", overwrite)[0] == "print(1)\n"


@pytest.mark.usefixtures("_instant", "user_mappers")
def test_own_mapper_is_warned_of(detector, weights, photos, tmp_path, log):
    """Without a standalone.py, which cannot prepare its images."""
    cfg, _ = detector("INPUT.MAPPER", "GreyMapper")
    written = export_model(cfg, weights, tmp_path / "new" / "model.onnx", images=[str(photos)])
    assert written.metadata.resampler == "custom"
    assert not (tmp_path / "new" / "standalone.py").exists()
    warnings = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert any(line.startswith("INPUT.MAPPER GreyMapper prepares images") for line in warnings)


@pytest.mark.slow
def test_file_that_differs_is_not_handed_over(detector, weights, photos, tmp_path, monkeypatch):
    """There is the report only, and a file that was there before stays."""
    monkeypatch.setitem(parity.TOLERANCES, "logits", -1.0)
    output = tmp_path / "model.pt2"
    output.write_bytes(b"before")
    message = r"model.pt2 is not written: it differs .* batch of 1 images of 64x85: logits_p3 at "
    with pytest.raises(ConfigError, match=message):
        options = {"stage": "head", "images": [str(photos)], "overwrite": True}
        export_model(detector()[0], weights, output, **options)
    assert output.read_bytes() == b"before"
    report = json.loads(report_path(output).read_text())
    assert report["batches"][0]["where"].startswith("logits_p3")


def test_inputs_are_checked_before_the_long_work(detector, weights, photos, tmp_path):
    """One line each; nothing is written."""
    cfg, _ = detector("DATASETS.TEST", "()", "DATASETS.TRAIN", "('coco_2017_train',)")

    def fails(message, output="model.onnx", images=(str(photos),), weights=weights, opts=()):
        with pytest.raises(ConfigError, match=message) as error:
            export_model(cfg, weights, tmp_path / output, images=images, opts=opts)
        assert "\n" not in str(error.value)

    fails(r"model.pth: an exported model ends in .onnx", "model.pth")
    fails(r"there are no images: coco_2017_train .*: name a folder .* by --images", images=())
    fails(r"phtos is no image, folder or dataset", images=["phtos"])
    fails(r"did you mean 'coco_2017_val", images=["coco_2017_vall"])
    fails(r"notes.txt can be read: name others", images=[str(photos / "notes.txt")])
    fails(r"INPUT.FORMAT YUV-BT.601: only BGR and RGB", opts=["INPUT.FORMAT", "YUV-BT.601"])
    fails(r"missing.pth", weights=tmp_path / "missing.pth")
    (tmp_path / "folder.onnx").mkdir()
    fails(r"folder.onnx is a folder", "folder.onnx")
    (tmp_path / "model.bin").write_bytes(b"of another model")
    fails(r"model.bin is there already: --overwrite", "model.xml")
    fails(r"cannot write .*photos/b.png/model.onnx: File exists", "photos/b.png/model.onnx")
    assert {x.name for x in tmp_path.iterdir()} == {
        "weights.pth",
        "photos",
        "folder.onnx",
        "model.bin",
    }
