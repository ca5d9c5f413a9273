"""standalone.py: no PyTorch, and the detections of the model that was exported."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image, ImageFont
from sklearn.datasets import load_sample_images

from retina_plugin.data.images import read_image as read_as_in_training
from retina_plugin.data.resizing import TorchvisionResizeShortestEdge
from retina_plugin.deploy import load_exported, standalone
from retina_plugin.deploy.metadata import METADATA_KEY
from retina_plugin.deploy.standalone import Detector, DetectorError
from retina_plugin.predict import Predictions
from tests.deploy.detections import assert_same_detections
from tests.deploy.echo import NAMES, metadata, write_echo


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sizes(number, largest=160):
    """Pairs of old and new (height, width)."""
    drawn = np.random.default_rng(1).integers(1, largest, (number, 4)).tolist()
    return [((a, b), (c, d)) for a, b, c, d in drawn]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels(50, 100, 3)).save(path)
    return path


def test_it_imports_nothing_but_three_packages(repo):
    tree = ast.parse((repo / "retina_plugin/deploy/standalone.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    assert names - sys.stdlib_module_names == {"numpy", "PIL", "onnxruntime"}


def test_command_runs_alone_without_torch(repo, tmp_path, image):
    shutil.copy(repo / "retina_plugin/deploy/standalone.py", tmp_path)
    write_echo(tmp_path / "model.onnx")
    program = (
        "import sys, standalone\n"
        "try: standalone.main()\n"
        "finally: assert not {'torch', 'retina_plugin', 'cv2'} & set(sys.modules)"
    )
    arguments = ["model.onnx", "image.png", "no.png", "--score", "0.1", "--json", "found.json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--draw", "drawn"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("left out: cannot read the image no.png: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.startswith("image.png: 2 detections\n  кошка")
    entries = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [e["category_id"] for e in entries] == [7, 8]
    drawn = Image.open(tmp_path / "drawn" / "image.png")
    assert drawn.size == (100, 50)
    assert (np.asarray(drawn) != np.asarray(Image.open(image))).any()


def test_drawn_images_have_the_names_of_the_inputs(tmp_path, image):
    """A number only tells apart those that share a name."""
    write_echo(tmp_path / "model.onnx")
    for name in ("other/image.png", "other/IMAGE.jpg", "other/image_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(image).save(tmp_path / name)
    images = [str(image), *map(str, sorted((tmp_path / "other").iterdir())), str(image)]
    with pytest.raises(SystemExit) as status:
        standalone.main([str(tmp_path / "model.onnx"), *images, "--draw", str(tmp_path / "drawn")])
    assert status.value.code == 0
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["IMAGE_2.png", "image.png", "image_2_2.png", "image_3.png", "image_4.png"]


def fails(*arguments):
    """The exit status of the command, or its line."""
    with pytest.raises(SystemExit) as left:
        standalone.main([str(argument) for argument in arguments])
    return left.value.code


@pytest.mark.parametrize("link", [False, True])
def test_drawn_images_do_not_replace_inputs(link, tmp_path, image, monkeypatch):
    """Not even through a link, and none was detected before that is found."""
    write_echo(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    folder, source = ".", "image.png"
    if link:
        (tmp_path / "drawn").mkdir()
        (tmp_path / "drawn" / "IMAGE.png").symlink_to(image)
        folder, source = "drawn", "drawn/IMAGE.png"
    before = image.read_bytes()
    line = fails("model.onnx", source, "no.png", "--draw", folder, "--json", "found.json")
    assert line.startswith("error: --draw: the drawn image ") and "would replace an input" in line
    assert image.read_bytes() == before and not (tmp_path / "found.json").exists()
    assert fails("model.onnx", source, "--draw", "elsewhere") == 0


def test_class_names_that_the_terminal_cannot_show(repo, tmp_path, image):
    """They are replaced in the text, and whole in the JSON."""
    write_echo(tmp_path / "model.onnx")
    command = [sys.executable, repo / "retina_plugin/deploy/standalone.py", "model.onnx", image]
    done = subprocess.run(
        [*command, "--json", "found.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"\n  ?????  " in done.stdout
    entries = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [e["category_name"] for e in entries] == ["кошка", "dog"]


def test_labels_have_letters_of_other_alphabets(tmp_path):
    """Pillow's own font draws the same sign for each of them."""
    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("DejaVuSans.ttf is not here")

    def drawn(name):
        names = (name, *NAMES[1:])
        detect = Detector(write_echo(tmp_path / "model.onnx", class_names=names))
        image = Image.new("RGB", (100, 50), "white")
        return standalone.draw(image, detect(image)).tobytes()

    assert drawn("кошка") != drawn("кожка")
    assert drawn("café") != drawn("cafà")


def test_json_is_written_to_a_new_folder_or_fails_at_once(tmp_path, image, capsys):
    model = write_echo(tmp_path / "model.onnx")
    assert fails(model, image, "--json", tmp_path / "no" / "such" / "found.json") == 0
    assert len(json.loads((tmp_path / "no/such/found.json").read_text("utf-8"))) == 2
    capsys.readouterr()
    assert str(fails(model, image, "--json", tmp_path)).startswith("error: ")
    assert capsys.readouterr().out == ""  # before the first image


@pytest.mark.parametrize("score", ["1.5", "-0.1", "nan", "high"])
def test_score_is_a_probability(score, tmp_path, image, capsys):
    assert fails(write_echo(tmp_path / "model.onnx"), image, "--score", score) == 2
    assert "argument --score: " in capsys.readouterr().err


@pytest.mark.parametrize("old, new", sizes(40))
def test_resize_equals_torch_to_the_bit(old, new):
    image = pixels(*old, 3)
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(batch, new, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(standalone.resize_like_torch(image, *new), resized.numpy())


@pytest.mark.parametrize("old, new", sizes(20))
def test_resize_without_antialias_equals_torch(old, new):
    image = pixels(*old, 3)
    batch = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None]
    resized = F.interpolate(batch, new, mode="bilinear")[0].permute(1, 2, 0).numpy()
    ours = standalone.resize_without_antialias(image, *new)
    # of 255: torch rounds coordinates to float32 in one of two ways, by size
    np.testing.assert_allclose(ours, resized, atol=3e-3)


@pytest.mark.parametrize("short, longest", [(800, 1333), (160, 1333), (37, 50), (0, 1333)])
def test_input_has_the_size_of_the_test_augmentation(short, longest, tmp_path):
    shapes = {"detectron2": T.ResizeShortestEdge, "torchvision": TorchvisionResizeShortestEdge}
    for resize, augmentation in shapes.items():
        record = {"min_size": short, "max_size": longest, "resize": resize}
        detect = Detector(write_echo(tmp_path / "model.onnx", **record))
        augment = augmentation(short, longest)
        for height, width in [(427, 640), (33, 47), (401, 333), (50, 700), (999, 1000)]:
            image = np.zeros((height, width, 3), np.uint8)
            expected = augment.get_transform(image).apply_image(image).shape
            assert detect._resize(image).shape == expected


def test_boxes_are_scaled_and_clipped_and_empty_ones_dropped(tmp_path):
    detect = Detector(write_echo(tmp_path / "model.onnx"))
    found = detect(pixels(100, 200, 3))  # twice the size of the input
    np.testing.assert_array_equal(found.boxes, [[20, 20, 60, 80], [120, 40, 200, 100]])
    assert found.class_names == ["кошка", "dog"] and found.image_size == (100, 200)


def test_clipped_boxes_are_not_clipped_again(tmp_path):
    detect = Detector(write_echo(tmp_path / "model.onnx", boxes_outside="clip"))
    found = detect(pixels(100, 200, 3))
    np.testing.assert_array_equal(found.boxes, [[20, 20, 60, 80], [120, 40, 260, 140]])


@pytest.mark.parametrize(
    "names, ids", [(["000139.png", "7.png"], [139, 7]), (["a.png", "7.png"], [1, 2])]
)
def test_names_that_are_numbers_are_image_ids(names, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_echo(tmp_path / "model.onnx")
    for name in names:
        Image.fromarray(pixels(50, 100, 3)).save(name)
    with pytest.raises(SystemExit) as left:
        standalone.main(["model.onnx", *names, "--json", "found.json"])
    assert left.value.code == 0
    entries = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert list(dict.fromkeys(e["image_id"] for e in entries)) == ids
    assert list(dict.fromkeys(e["file_name"] for e in entries)) == names


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_channels_have_the_order_of_the_model(order, tmp_path):
    image = np.full((50, 100, 3), [10, 20, 30], np.uint8)
    path = write_echo(tmp_path / "model.onnx", format=order)
    means = [10, 20] if order == "RGB" else [30, 20]
    for source in (Image.fromarray(image), np.ascontiguousarray(image[:, :, ::-1])):
        scores = Detector(path)(source).scores
        np.testing.assert_allclose(scores, np.array(means) / 255, rtol=1e-5)


@pytest.mark.parametrize("ids", [(7, 8, 9), None])
def test_coco_entries_are_those_of_predictions(ids, tmp_path):
    found = Detector(write_echo(tmp_path / "model.onnx", category_ids=ids))(pixels(50, 90, 3))
    same = Predictions(found.boxes, found.scores, found.class_ids, (50, 90), NAMES, ids)
    assert found.to_coco(5) == same.to_coco(5)
    assert json.loads(json.dumps(found.to_coco())) == same.to_coco()


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_images_are_read_as_in_training(tmp_path):
    photo = load_sample_images().images[0][:120, :163]
    image = Image.fromarray(photo)
    files = [
        saved(tmp_path / "rgb.png", image),
        saved(tmp_path / "rgb.jpg", image),
        saved(tmp_path / "rgb.webp", image),
        saved(tmp_path / "progressive.jpg", image, progressive=True, quality=70),
        saved(tmp_path / "grey.jpg", image.convert("L")),
        saved(tmp_path / "cmyk.jpg", image.convert("CMYK")),
        saved(tmp_path / "palette.png", image.convert("P")),
        saved(tmp_path / "one_bit.png", image.convert("1")),
        saved(tmp_path / "alpha.png", Image.fromarray(np.dstack([photo, pixels(120, 163)]))),
    ]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        files.append(saved(tmp_path / f"{orientation}.jpg", image, exif=exif))
        files.append(saved(tmp_path / f"{orientation}.png", image, exif=exif))
    for file in files:
        expected = read_as_in_training(str(file), "RGB")
        np.testing.assert_array_equal(standalone.read_image(file), expected, file.name)


def test_bad_images_are_one_line(tmp_path, image):
    detect = Detector(write_echo(tmp_path / "model.onnx"))
    damaged = bytearray(image.read_bytes())
    damaged[-13] ^= 1  # the checksum of the pixels
    (tmp_path / "damaged.png").write_bytes(damaged)
    Image.fromarray(pixels(50, 50, 3)).save(tmp_path / "cut.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.jpg").write_text("hello")
    names = ["damaged.png", "cut.jpg", "deep.png", "text.jpg", "missing.jpg", "."]
    for bad in [*(tmp_path / name for name in names), pixels(5, 5), pixels(3, 9, 9), np.zeros(3)]:
        with pytest.raises(DetectorError) as raised:
            detect(bad)
        assert "\n" not in str(raised.value) and len(str(raised.value)) > 20
    thin = Detector(write_echo(tmp_path / "thin.onnx", min_size=50, max_size=60))
    with pytest.raises(DetectorError, match="an image of 1x200 pixels is too thin"):
        thin(pixels(200, 1, 3))


@pytest.mark.parametrize(
    "record, message",
    [
        ("", "has no metadata of retina_plugin: write it with `retina export"),
        ("{", "its metadata cannot be read"),
        ("[]", "its metadata cannot be read"),
        ('{"version": 2, "stage": "nms"}', "has metadata of version 2"),
        (metadata(stage="boxes").to_json(), "--output-stage boxes: .* with --output-stage nms"),
        (metadata(resampler="custom").to_json(), "INPUT.MAPPER that prepares images in its own"),
    ],
)
def test_models_that_it_cannot_run_are_one_line(record, message, tmp_path):
    path = write_echo(tmp_path / "model.onnx", record)
    with pytest.raises(DetectorError, match=message) as raised:
        Detector(path)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_models_are_one_line(tmp_path, image, monkeypatch, capsys):
    (tmp_path / "empty.onnx").touch()
    for bad in (tmp_path / "missing.onnx", tmp_path, image, tmp_path / "empty.onnx"):
        with pytest.raises(DetectorError, match="does not exist|cannot read it") as raised:
            Detector(bad)
        assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="error: onnxruntime: .*pip install onnxruntime"):
        standalone.main([str(image), str(image)])


def changed(source, target, **changes):
    """A copy of a model with other metadata."""
    model = onnx.load(source)
    record = dataclasses.replace(load_exported(source).metadata, **changes)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = record.to_json()
    onnx.save(model, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, changes",
    [
        ([], {}),
        (["INPUT.MAPPER", "DatasetMapper"], {"resampler": "pillow"}),
        (["INPUT.RESIZE", "torchvision"], {"resize": "torchvision"}),
        (
            ["INPUT.MIN_SIZE_TEST", 333, "INPUT.MAX_SIZE_TEST", 999],
            {"min_size": 333, "max_size": 999},
        ),
        (["INPUT.MIN_SIZE_TEST", 0], {"min_size": 0}),
    ],
    ids=["torch", "pillow", "torchvision", "larger", "not resized"],
)
def test_standalone_finds_what_the_predictor_finds(
    overrides, changes, exported_onnx, predictor, photos, tmp_path
):
    predict = predictor(*overrides)
    detect = Detector(changed(exported_onnx[0], tmp_path / "model.onnx", **changes), threads=1)
    for photo in photos:
        found, expected = detect(photo), predict(photo)
        assert_same_detections(found.boxes, found.scores, found.class_ids, expected)
        assert found.class_names == expected.class_names
        assert found.image_size == expected.image_size
