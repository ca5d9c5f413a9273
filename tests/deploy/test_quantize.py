"""Files in fewer bits: what is quantized, what is kept, and what is refused."""

import dataclasses

import numpy as np
import onnx
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from retina_plugin.deploy import load_exported
from retina_plugin.deploy.quantize import CalibrationImages, quantize
from retina_plugin.errors import ConfigError
from tests.deploy.small import write_small


@pytest.fixture(scope="module")
def metadata(detector, metadata_of):
    return metadata_of(*detector())


@pytest.fixture
def small(metadata, tmp_path):
    return write_small(tmp_path / "small.onnx", metadata)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(1)
    return [generator.uniform(0, 255, (1, 3, 8, 8 + 2 * i)).astype("f4") for i in range(4)]


def _types(path):
    """Of every value of an ONNX file."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    return {x.name: x.type.tensor_type.elem_type for x in (*graph.value_info, *graph.output)}


def _close(found, expected, part):
    """The mean difference as a part of the mean value."""
    return np.abs(found - expected).mean() <= part * np.abs(expected).mean()


@pytest.mark.parametrize(("method", "part"), [("int8", 0.05), ("fp16", 0.002)])
def test_quantized_file_is_near_and_says_so(small, metadata, images, tmp_path, method, part, capfd):
    output = tmp_path / "new" / "quantized.onnx"
    written = quantize(small, output, method, images)
    assert capfd.readouterr() == ("", "")  # of the libraries' bars and hints
    assert written == dataclasses.replace(metadata, quantized=method)
    quantized, exact = load_exported(output), load_exported(small)
    assert quantized.metadata == written
    for image in images:
        found, expected = quantized(image)["boxes"], exact(image)["boxes"]
        assert found.dtype == np.float32
        assert _close(found, expected, part) and not _close(found, expected, part / 100)
    assert [x.name for x in output.parent.iterdir()] == ["quantized.onnx"]


def test_arithmetic_around_the_network_stays_in_float32(small, images, tmp_path):
    """The pixels, the last convolution and the boxes; the others have 16 bits."""
    output = tmp_path / "half.onnx"
    quantize(small, output, "fp16")
    types = _types(output)
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {types[name] for name in ("y1", "x", "pooled", "y2", "up", "sum")} == {half}
    assert {types[name] for name in ("centered", "deltas", "boxes")} == {single}
    weights = {x.name: x.data_type for x in onnx.load(output).graph.initializer}
    assert half not in [weights[name] for name in ("mean", "c3.w", "scales")]
    assert "c1.w" not in weights  # only its copy of half the size


def test_int8_quantizes_weights_by_channel_in_7_bits(small, images, tmp_path):
    output = tmp_path / "int8.onnx"
    quantize(small, output, "int8", images)
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(output).graph.initializer}
    for name in ("c1.w", "c2.w"):
        values = weights[f"{name}_quantized"]
        assert values.dtype == np.int8 and np.abs(values).max() <= 64
        assert weights[f"{name}_scale"].shape == (8,)
    assert weights["c3.w"].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "output", "method", "message"),
    [
        ("small.onnx", "a.onnx", "int4", r"--quantize: unknown 'int4'.*known: int8, fp16"),
        ("a.pt2", "b.pt2", "int8", r"a.pt2: a .pt2 file cannot be quantized"),
        ("small.onnx", "a.xml", "int8", r"a.xml: quantizing does not change the format, .onnx"),
        ("none.onnx", "a.onnx", "int8", r"none.onnx does not exist"),
    ],
)
def test_what_cannot_be_quantized_is_refused(small, tmp_path, name, output, method, message):
    with pytest.raises(ConfigError, match=message):
        quantize(tmp_path / name, tmp_path / output, method)
    assert [x.name for x in tmp_path.iterdir()] == ["small.onnx"]


def test_quantized_file_is_not_quantized_again(small, tmp_path):
    half = tmp_path / "half.onnx"
    quantize(small, half, "fp16")
    with pytest.raises(ConfigError, match=r"half.onnx is quantized already \(fp16\)"):
        quantize(half, tmp_path / "int8.onnx", "int8", [])


def test_int8_needs_images(small, tmp_path):
    with pytest.raises(ConfigError, match="no images to calibrate with"):
        quantize(small, tmp_path / "int8.onnx", "int8", [])
    assert [x.name for x in tmp_path.iterdir()] == ["small.onnx"]


@pytest.fixture
def folder(tmp_path):
    """Ten images of ascending brightness, of which the fifth cannot be read."""
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(10):
        Image.new("RGB", (200, 100), (i, 2 * i, 0)).save(path / f"{i}.png")
    (path / "4.png").write_bytes(b"none")
    return path


def test_calibration_images_are_spread_and_resized_as_for_a_test(detector, folder):
    cfg, _ = detector(
        *("INPUT.MIN_SIZE_TEST", 50, "INPUT.MAX_SIZE_TEST", 200, "INPUT.FORMAT", "RGB")
    )
    images = CalibrationImages(cfg, [str(folder)], count=5)
    for _ in range(2):  # it can be gone through again
        found = list(images)
        assert {(x.shape, x.dtype) for x in found} == {((1, 3, 50, 100), np.dtype("f4"))}
        assert [x[0, :, 0, 0].tolist() for x in found] == [[i, 2 * i, 0] for i in (0, 2, 6, 8)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "DATASETS.TRAIN is empty, so name a dataset or a folder by --calibration"),
        (["quantize_missing"], r"no images .*not here.*name another .* by --calibration"),
        (["photoz"], "photoz is no image, folder or dataset"),
    ],
)
def test_missing_calibration_images_are_named(detector, sources, message, request):
    def load():
        raise FileNotFoundError("not here")

    DatasetCatalog.register("quantize_missing", load)
    request.addfinalizer(lambda: DatasetCatalog.remove("quantize_missing"))
    with pytest.raises(ConfigError, match=message):
        CalibrationImages(detector()[0], sources)


def test_unreadable_calibration_images_are_named(detector, folder):
    with pytest.raises(ConfigError, match=r"none of 1 images .*4.png"):
        list(CalibrationImages(detector()[0], [str(folder / "4.png")]))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "part"), [("int8", 0.05), ("fp16", 0.002)])
def test_openvino_file_is_near_and_says_so(small, metadata, images, tmp_path, method, part, capfd):
    import openvino

    exact_file, output = tmp_path / "small.xml", tmp_path / "quantized.xml"
    model = openvino.convert_model(small)
    model.set_rt_info(metadata.to_json(), "retina_plugin")
    openvino.save_model(model, exact_file, compress_to_fp16=False)
    import nncf  # noqa: F401  what PyTorch prints at its import is not of interest

    capfd.readouterr()
    written = quantize(exact_file, output, method, images)
    assert capfd.readouterr() == ("", "")  # of the libraries' bars and hints
    assert written == dataclasses.replace(metadata, quantized=method)
    quantized, exact = load_exported(output), load_exported(exact_file)
    assert quantized.metadata == written
    for image in images:
        found, expected = quantized(image)["boxes"], exact(image)["boxes"]
        assert _close(found, expected, part) and not _close(found, expected, part / 100)
    assert output.with_suffix(".bin").stat().st_size < exact_file.with_suffix(".bin").stat().st_size
    assert str(tmp_path) not in output.read_text()


@pytest.mark.slow
def test_detector_in_8_bit_finds_what_the_detector_finds(exported_onnx, noise, tmp_path):
    """Most of its best detections: the weights are random, so scores are close together."""
    path, _, _ = exported_onnx
    pixels = [x.numpy() for x in noise(4, 96, 128)[:, None]]
    quantize(path, tmp_path / "int8.onnx", "int8", pixels)
    quantized, exact = load_exported(tmp_path / "int8.onnx"), load_exported(path)
    for image in pixels:
        found, expected = quantized(image), exact(image)
        for i in range(5):
            near = np.abs(found["boxes"][0] - expected["boxes"][0, i]).max(axis=1) < 8
            same = found["classes"][0] == expected["classes"][0, i]
            assert (near & same).any()
