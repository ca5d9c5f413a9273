"""The predictor: forms of input, batches, errors, classes, and equality with Detectron2's."""

import itertools
import json
import sys
import types

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from PIL import Image

from retina_plugin.data.images import BadImageError, image_to_tensor
from retina_plugin.errors import ConfigError
from retina_plugin.predict import Predictions, RetinaPredictor
from retina_plugin.predict.sources import is_video, list_folder


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(a, b):
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.scores, b.scores)
    np.testing.assert_array_equal(a.class_ids, b.class_ids)
    assert a.image_size == b.image_size and a.names == b.names


def assert_near(a, b):
    """Equal but for the last digits, by which a batch of another size is rounded differently."""
    assert len(a) == len(b) > 0
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
    np.testing.assert_array_equal(a.class_ids, b.class_ids)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_one_image_equals_detectron2s_predictor(load, tiny_cfg, weights, image_format):
    """On an image that is not resized, because the resizes differ by a level."""
    tiny_cfg.MODEL.WEIGHTS, tiny_cfg.INPUT.FORMAT = str(weights), image_format
    image = noise(64, 80)
    expected = DefaultPredictor(tiny_cfg)(image)["instances"]
    found = load()(image)
    number = len(expected)  # ours may find more, where Detectron2 keeps boxes of no area
    assert 0 < number <= len(found)
    np.testing.assert_array_equal(found.boxes[:number], expected.pred_boxes.tensor.numpy())
    np.testing.assert_array_equal(found.scores[:number], expected.scores.numpy())
    np.testing.assert_array_equal(found.class_ids[:number], expected.pred_classes.numpy())
    assert found.to_instances().image_size == (64, 80)


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "YUV-BT.601"])
def test_all_forms_of_an_image_give_the_same(load, tiny_cfg, tmp_path, image_format):
    tiny_cfg.INPUT.FORMAT = image_format
    predictor, image = load(), noise(50, 70)
    cv2.imwrite(str(tmp_path / "é a.png"), image)
    pil = Image.fromarray(image[:, :, ::-1])
    alpha = np.dstack([image, np.zeros((50, 70), np.uint8)])
    rgba = pil.copy()
    rgba.putalpha(3)
    flipped = image[::-1].copy()[::-1]  # a view with a negative stride
    expected = predictor(image)
    assert len(expected) > 0
    for form in (tmp_path / "é a.png", str(tmp_path / "é a.png"), pil, alpha, rgba, flipped):
        assert_same(predictor(form), expected)


def test_grey_forms_give_the_same(load, tmp_path):
    grey = noise(50, 70)[:, :, 0]
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    predictor = load()
    expected = predictor(np.dstack([grey] * 3))
    for form in (grey, grey[:, :, None], Image.fromarray(grey), tmp_path / "a.png"):
        assert_same(predictor(form), expected)


def test_exif_orientation_as_in_training(load, tmp_path):
    """A path and the opened file are both turned upright."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(50, 70)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    predictor = load()
    found = predictor(tmp_path / "a.jpg")
    assert found.image_size == (70, 50) and found.draw().shape == (70, 50, 3)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert_same(predictor(opened), found)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_batches_give_what_single_images_give(load, batch_size):
    """Mixed sizes, in order; features are those of the image alone, so nothing is crowded out."""
    sizes = [(64, 64), (64, 200), (50, 70), (64, 64), (300, 64), (64, 64), (50, 70), (64, 200)]
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    one_by_one = [load()(image) for image in images]
    together = load(batch_size=batch_size)(images)
    assert [x.image_size for x in together] == sizes
    for a, b in zip(together, one_by_one, strict=True):
        assert_near(a, b)


def test_batches_are_filled(load, monkeypatch):
    """Images of one padded size share a batch although others lie between them."""
    predictor, sizes = load(batch_size=4), []
    model = predictor._model
    monkeypatch.setattr(predictor, "_model", lambda x: sizes.append(len(x)) or model(x))
    predictor([noise(64, w) for w in (64, 200, 64, 200, 64, 200, 64, 200)])
    assert sizes == [4, 4]


def test_list_folder_and_iterator(load, tmp_path):
    for name in ("b.png", "a.png", "c.JPG", ".hidden.png", "d.txt"):
        (tmp_path / "in").mkdir(exist_ok=True)
        data = cv2.imencode(".png", noise(40, 40))[1].tobytes()
        (tmp_path / "in" / name).write_bytes(data)
    predictor = load()
    assert predictor([]) == []
    assert isinstance(predictor([noise(40, 40)])[0], Predictions)
    found = predictor(tmp_path / "in")
    assert iter(found) is found
    assert [x.path.rpartition("/")[2] for x in found] == ["a.png", "b.png", "c.JPG"]


@pytest.mark.parametrize("name", ["00001.MTS", "a.m2ts", "a.ts", "a.3gp", "a.ogv", "a.mp4"])
def test_videos_of_a_folder(tmp_path, name):
    (tmp_path / name).touch()
    assert is_video(name)
    assert list_folder(tmp_path, videos=True) == [str(tmp_path / name)]
    assert list_folder(tmp_path) == []


def test_iterator_reads_only_a_little_ahead(load):
    """An endless source; a broken item is reported and left out."""
    read, errors = itertools.count(), []
    last = 0

    def source():
        nonlocal last
        for last in read:
            yield None if last == 1 else noise(40, 40, last)

    stream = load(batch_size=2).stream(source(), on_error=lambda *e: errors.append(e))
    found = list(itertools.islice(stream, 20))
    stream.close()
    assert len(found) == 20 and len(errors) == 1
    assert last < 20 + 1 + 4 * 2 + 2 + 3


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "cv2.imread"),
        (3.5, "type float"),
        (torch.zeros(3, 8, 8), "type Tensor"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (np.zeros((8, 8, 2), np.uint8), "8 x 8 x 2"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros(8, np.uint8), "got 8"),
        (Image.new("I;16", (8, 8)), "8 bit"),
        (np.zeros((1, 5000, 3), np.uint8), "5000x1"),
        ("no such.jpg", "no such.jpg"),
    ],
)
def test_unusable_image_is_one_line(load, image, said):
    with pytest.raises(ConfigError, match=said) as error:
        load()(image)
    assert "\n" not in str(error.value)


def test_bad_file_in_a_list_raises_and_stream_goes_on(load, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [noise(40, 40), tmp_path / "bad.jpg", noise(40, 40)]
    with pytest.raises(BadImageError, match="bad.jpg"):
        load()(images)
    errors = []
    assert len(list(load().stream(images, lambda source, error: errors.append(source)))) == 2
    assert errors == [tmp_path / "bad.jpg"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": 2}, "score 2"),
        ({"classes": ["дзета 11"]}, "did you mean"),
        ({"classes": "cat"}, "list of names"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"tile": 3}, "tile 3"),
        ({"tile": 64, "overlap": 1.0}, "overlap 1"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "cuda:99"}, "sees"),
        ({"device": "meta"}, "device 'meta' has shapes"),
        ({"device": "maia"}, "device 'maia' does not work .*; cpu always does"),
        ({"opts": ["MODEL.NO", "1"]}, "MODEL.NO"),
        ({"opts": ["MODEL.RETINANET.NUM_CLASSES", "3"]}, "NUM_CLASSES"),
    ],
)
def test_unusable_option_is_one_line(load, options, said):
    with pytest.raises(ConfigError, match=said):
        load(**options)


def test_weights_must_be_there_and_complete(tiny_cfg, weights, tmp_path):
    with pytest.raises(ConfigError, match="no weights"):
        RetinaPredictor.load(tiny_cfg)
    with pytest.raises(ConfigError, match="no file"):
        RetinaPredictor.load(tiny_cfg, tmp_path / "none.pth")
    state = torch.load(weights)["model"]
    del state["head.cls_score.bias"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match="lacks 1 of"):
        RetinaPredictor.load(tiny_cfg, tmp_path / "part.pth")


def test_score_and_classes(load):
    """A score below the config's lowers it; a higher one filters."""
    image = noise(64, 64)
    high = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.33"]
    assert load(opts=high)(image).scores.min() > 0.33
    assert load(opts=high, score=0.1)(image).scores.min() < 0.33
    assert_same(load(score=0.3)(image), load()(image).filter(score=0.3))
    few = load(classes=["дзета 3", "дзета 1"])(image)
    assert set(few.class_ids) == {1, 3} and set(few.class_names) == {"дзета 1", "дзета 3"}


def test_class_names(tiny_cfg, weights, tmp_path, log):
    """Of the checkpoint, else of the dataset with its ids, else numbers with a warning."""
    assert RetinaPredictor.load(tiny_cfg, weights).names[0] == "дзета 0"
    plain = tmp_path / "plain.pth"
    torch.save({"model": torch.load(weights)["model"]}, plain)
    assert RetinaPredictor.load(tiny_cfg, plain).names == tuple("0123456789")
    assert "digits_scenes_train" in log.text and "numbers stand" not in log.text
    options = {"opts": ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('no_such',)"]}
    assert RetinaPredictor.load(tiny_cfg, plain, **options).names == tuple("0123456789")
    assert "numbers stand" in log.text


def test_unknown_ids_of_the_classes_are_named(tiny_cfg, weights, tmp_path, monkeypatch, log):
    """``category_id`` is another where the dataset cannot be read, as in another folder."""
    names = [f"дзета {k}" for k in range(10)]
    dataset = "coco:val.json:val"
    categories = [{"id": 5 * k + 5, "name": name} for k, name in enumerate(names)]
    coco = {"images": [], "annotations": [], "categories": categories}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "val.json").write_text(json.dumps(coco))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (), (dataset,)

    def warnings(folder, **options):
        log.clear()
        monkeypatch.chdir(folder)
        ids = RetinaPredictor.load(tiny_cfg, weights, **options).category_ids
        said = [r.getMessage() for r in log.records if "category_id" in r.getMessage()]
        return ids, said

    assert warnings(tmp_path / "a") == (tuple(range(5, 55, 5)), [])
    because = "category_id is the class's index from 0, because the dataset"
    assert warnings(tmp_path) == (
        None,
        [f"{because} {dataset} cannot be read at {tmp_path / 'val.json'}"],
    )
    assert warnings(tmp_path, opts=["DATASETS.TEST", "()"]) == (None, [])
    of_code = warnings(tmp_path, opts=["DATASETS.TEST", "('of_my_code',)"])
    assert of_code == (None, [f"{because} of_my_code is not known here"])
    of_others = warnings(tmp_path, opts=["DATASETS.TEST", "('digits_scenes_val',)"])
    assert of_others == (None, [])  # it has other classes, wherever the command runs


def test_public_model_by_name(tiny_cfg, weights, monkeypatch, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(tiny_cfg.dump())
    module = types.ModuleType("retina_plugin.weights.public_models")
    module.prepare_model = {"hub/model": (str(config), str(weights))}.__getitem__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = RetinaPredictor.from_model("hub/model", score=0.2)(noise(64, 64))
    assert found.scores.min() >= 0.2


@pytest.mark.parametrize("tile", [None, 64])
def test_views_of_an_image_are_merged(load, tile):
    """TEST.AUG: one view of the test size is the plain detection, more are another."""
    image = noise(100, 90)
    plain = load(tile=tile)(image)
    views = ["TEST.AUG.ENABLED", "True", "TEST.AUG.FLIP", "False", "TEST.AUG.MIN_SIZES"]
    one = load(tile=tile, opts=[*views, "(64,)"])(image)
    np.testing.assert_array_equal(one.boxes, plain.boxes)
    np.testing.assert_array_equal(one.scores, plain.scores)
    predictor = load(tile=tile, opts=[*views, "(64, 96)"])
    merged = predictor(image)
    assert len(merged) and not np.array_equal(merged.scores, plain.scores)
    with pytest.raises(ConfigError, match="5000x1"):
        load(opts=[*views, "(64,)", "TEST.AUG.MAX_SIZE", "1000"])(np.zeros((1, 5000, 3), np.uint8))


def test_tiles_lift_pillows_limit(load, monkeypatch, tmp_path):
    """Above twice the limit Pillow raises. A second run goes on when the first one has ended."""
    cv2.imwrite(str(tmp_path / "a.png"), noise(64, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 80 // 2 - 1)
    with pytest.raises(BadImageError, match=r"a.png has too many pixels .*5120 pixels.* --tile"):
        load()(tmp_path / "a.png")
    predictor = load(tile=48)
    first, second = (predictor.stream([tmp_path / "a.png"] * 3) for _ in range(2))
    next(first), next(second)
    first.close()
    assert len(list(second)) == 2 and Image.MAX_IMAGE_PIXELS == 64 * 80 // 2 - 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert predictor(tmp_path / "a.png").image_size == (64, 80) and Image.MAX_IMAGE_PIXELS is None


@pytest.mark.parametrize("merge", ["wbf", "soft_nms", "class_agnostic"])
def test_every_merge_gives_boxes_with_an_area(load, merge):
    opts = ["TEST.MERGE", merge, "MODEL.RETINANET.BOXES_OUTSIDE_TEST", "clip"]
    found = load(opts=opts)(noise(70, 90))
    assert len(found) and (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (np.diff(found.scores) <= 0).all()


def test_box_without_area_is_no_prediction():
    """Torchvision's models give them where a box lies outside the image."""
    found = Instances((8, 8), scores=torch.tensor([0.9, 0.8]), pred_classes=torch.tensor([0, 0]))
    found.pred_boxes = Boxes(torch.tensor([[8.0, 1, 8, 5], [1, 1, 4, 5]]))
    predictor = RetinaPredictor(
        lambda batch: [{"instances": found}], image_to_tensor, image_format="BGR", names=["a"]
    )
    assert predictor(noise(8, 8)).scores.tolist() == pytest.approx([0.8])


def test_part_of_an_object_of_another_class_is_not_kept():
    """A tile takes the cut object for "b", the tile that sees it whole for "a"."""

    def model(batch):
        results = []
        for x in batch:
            first = bool(x["image"][0, 0, 0] == 1)
            box, k = ([50.0, 10, 64, 40], 1) if first else ([18.0, 10, 38, 40], 0)
            found = Instances((64, 64), scores=torch.tensor([0.9]), pred_classes=torch.tensor([k]))
            found.pred_boxes = Boxes(torch.tensor([box]))
            results.append({"instances": found})
        return results

    image = np.zeros((64, 96, 3), np.uint8)
    image[0, 0] = 1
    options = {"image_format": "BGR", "names": ["a", "b"], "tile": 64, "overlap": 0.5}
    for classes, expected in ((None, [[50, 10, 70, 40]]), (["a"], [[50, 10, 70, 40]]), (["b"], [])):
        predictor = RetinaPredictor(model, image_to_tensor, classes=classes, **options)
        assert predictor(image).boxes.tolist() == expected


def test_mapper_without_prepare_image_is_one_line(load, monkeypatch):
    from retina_plugin.data import FastMapper

    monkeypatch.delattr(FastMapper, "prepare_image")
    with pytest.raises(ConfigError, match="prepare_image"):
        load(opts=["INPUT.MAPPER", "FastMapper"])
