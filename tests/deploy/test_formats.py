"""Written files: equal results at every size, and what they say of themselves."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch

from retina_plugin.deploy import DenseModel, formats, load_exported, write_exported
from retina_plugin.deploy.metadata import METADATA_KEY
from retina_plugin.errors import ConfigError
from retina_plugin.optional import optional

SIZES = [(1, 64, 96), (3, 64, 64), (2, 33, 47), (1, 1, 5), (2, 150, 70)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
def test_file_equals_the_model_at_every_size(exported, metadata_of, noise, suffix):
    """pt2 to the bit; the others compute the convolutions in another order."""
    path, cfg, model = exported(suffix)
    file = load_exported(path, threads=1)
    assert file.metadata == metadata_of(cfg, model)
    assert file.output_names == ("boxes", "scores", "classes")
    dense = DenseModel(model).eval()
    parts = [path.read_bytes()]
    if suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    places = [sys.prefix.encode(), __file__.encode(), formats.__file__.encode()]
    assert not any(place in part for place in places for part in parts), "a path of this machine"
    for n, height, width in SIZES:
        images = noise(n, height, width)
        found = file(images.numpy())
        with torch.no_grad():
            boxes, scores, classes = (x.numpy() for x in dense(images))
        assert (found["classes"] == classes).all() and (classes >= 0).any()
        if suffix == ".pt2":
            assert (found["boxes"] == boxes).all() and (found["scores"] == scores).all()
        np.testing.assert_allclose(found["scores"], scores, atol=5e-6)
        np.testing.assert_allclose(found["boxes"], boxes, atol=3e-4)


@pytest.mark.slow
def test_onnx_file_describes_its_tensors(exported_onnx):
    path, _, _ = exported_onnx
    model = onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    tensors = [*model.graph.input, *model.graph.output]
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in tensors
    }
    assert shapes == {
        "image": ["N", 3, "H", "W"],
        "boxes": ["N", 100, 4],
        "scores": ["N", 100],
        "classes": ["N", 100],
    }
    assert {node.domain for node in model.graph.node} == {""}
    assert [x.key for x in model.metadata_props] == [METADATA_KEY]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["boxes", "head"])
def test_other_stages_are_written_too(exported, noise, stage):
    path, _, model = exported(".onnx", stage)
    file = load_exported(path, threads=1)
    images = noise(2, 70, 90)
    with torch.no_grad():
        expected = DenseModel(model, stage).eval()(images)
    for found, reference in zip(file(images.numpy()).values(), expected, strict=True):
        np.testing.assert_allclose(found, reference, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_pt2_runs_where_only_the_operator_is_imported(exported, tmp_path):
    """As the documentation shows."""
    path, _, _ = exported(".pt2")
    code = "import sys, torch, retina_plugin.deploy\n"
    code += "detect = torch.export.load(sys.argv[1]).module()\n"
    code += "print([list(x.shape) for x in detect(torch.zeros(2, 3, 40, 50))])\n"
    run = [sys.executable, "-c", code, str(path)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == [[2, 100, 4], [2, 100], [2, 100]]


def test_old_torch_is_refused():
    formats.check_torch("2.14.0+cpu")
    formats.check_torch("3.0.0a0")
    with pytest.raises(
        ConfigError, match=r"^torch 2.9.1 is too old for an export: upgrade .* 2.14"
    ):
        formats.check_torch("2.9.1")


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"^a.xml needs openvino: pip install '.*\[openvino\]'"):
        optional("openvino", "a.xml")


def test_model_that_cannot_be_traced_is_one_line(detector, metadata_of, monkeypatch, tmp_path):
    cfg, model = detector()
    dense = DenseModel(model).eval()
    monkeypatch.setattr(model.head, "forward", lambda features: [float(x.sum()) for x in features])
    with pytest.raises(ConfigError, match=r"torch.export cannot trace the model: .*") as error:
        write_exported(dense, metadata_of(cfg, model), tmp_path / "a.pt2")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_foreign_files_are_refused(tmp_path):
    """A line that names the file and why."""
    with pytest.raises(ConfigError, match=r"a.pth: an exported model ends in .onnx \(onnx\), "):
        load_exported(tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"a.onnx does not exist"):
        load_exported(tmp_path / "a.onnx")
    libraries = {"a.onnx": "onnxruntime", "a.pt2": "torch", "a.xml": "openvino"}
    for name, library in libraries.items():
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match=rf"{name} cannot be read by {library}: .") as error:
            load_exported(tmp_path / name)
        assert "\n" not in str(error.value)


def test_unreadable_files_say_why(tmp_path, capfd):
    """In one line, without what their libraries print."""
    model = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(3)}, model)
    net = '<?xml version="1.0"?>\n<net name="a" version="11"></net>'
    for name, content, beside, message in [
        ("a.pt2", model.read_bytes(), True, r"torch.export did not write it"),
        ("a.pt2", b"", True, r"torch.export did not write it"),
        ("a.xml", net.encode(), False, r"a.bin, which holds its weights, is not beside it: copy"),
        ("a.xml", b"", True, r"its content is not that of OpenVINO: write it with"),
        ("a.xml", net.replace("</net>", "").encode(), True, r"Start-end tags mismatch"),
        ("a.xml", b"<html></html>", True, r"its content is not that of OpenVINO: write it with"),
    ]:
        (tmp_path / name).write_bytes(content)
        (tmp_path / "a.bin").touch() if beside else (tmp_path / "a.bin").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=rf"{name} cannot be read by \w+: {message}"):
            load_exported(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_openvino_needs_its_ending_in_lower_case(detector, metadata_of, tmp_path):
    """Before the model is traced: OpenVINO would refuse to save it."""
    cfg, model = detector()
    for call in (
        lambda: load_exported(tmp_path / "M.XML"),
        lambda: write_exported(DenseModel(model), metadata_of(cfg, model), tmp_path / "M.XML"),
    ):
        with pytest.raises(ConfigError, match=r"M.XML: OpenVINO needs the ending .xml in lower"):
            call()
    assert formats.format_of("M.ONNX") == "onnx"


def test_onnx_of_others_is_refused(tmp_path):
    """Without our metadata nobody knows its input."""
    value = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["image"], ["out"])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match=r"a.onnx has no metadata of retina_plugin"):
        load_exported(tmp_path / "a.onnx")
