"""Results: conversions, filters, drawing."""

import builtins
import itertools

import numpy as np
import pytest

from retina_plugin.errors import ConfigError
from retina_plugin.predict import Predictions
from retina_plugin.predict.drawing import _drawable, class_colour


@pytest.fixture
def found():
    boxes = np.array([[10, 20, 30, 60], [0, 0, 99, 79], [50, 5, 70, 15]], np.float32)
    scores, classes = np.array([0.9, 0.5, 0.1], np.float32), np.array([1, 0, 1])
    return Predictions(boxes, scores, classes, (80, 100), ("Katze", "große 猫"), (7, 9), "a/b.jpg")


def test_slices_and_filters(found):
    assert len(found) == 3 and found.class_names == ["große 猫", "Katze", "große 猫"]
    assert found[-1].scores.tolist() == found[2:].scores.tolist() == found.scores[2:].tolist()
    assert len(found[found.scores > 0.3]) == 2 and len(list(found)) == 3
    assert found.filter(score=0.5).class_ids.tolist() == [1, 0]
    assert len(found.filter(classes=["große 猫"], score=0.2)) == 1
    for name in ("Katz", "KATZE"):
        with pytest.raises(ConfigError, match="did you mean 'Katze'"):
            found.filter(classes=[name])
    with pytest.raises(IndexError):
        found[3]


def test_coco_results(found):
    """Ids of the dataset; without them, the classes themselves."""
    first = found.to_coco(image_id=139)[0]
    assert first["bbox"] == [10, 20, 20, 40] and first["category_id"] == 9
    assert first["image_id"] == 139 and first["category_name"] == "große 猫"
    assert first["file_name"] == "a/b.jpg"
    plain = Predictions(found.boxes, found.scores, found.class_ids, (80, 100), found.names)
    assert [x["category_id"] for x in plain.to_coco()] == [1, 0, 1]
    assert "file_name" not in plain.to_coco()[0] and found[:0].to_coco() == []


def test_instances_and_supervision(found):
    instances = found.to_instances()
    assert instances.image_size == (80, 100)
    np.testing.assert_array_equal(instances.pred_boxes.tensor, found.boxes)
    supervision = pytest.importorskip("supervision")
    for some in (found, found[:0]):
        detections = some.to_supervision()
        assert isinstance(detections, supervision.Detections)
        np.testing.assert_array_equal(detections.xyxy, some.boxes)
        assert detections["class_name"].tolist() == some.class_names


def test_missing_supervision_is_one_line(found, monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "supervision":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match=r"retina_plugin\[supervision\]"):
        found.to_supervision()


def test_drawing_needs_the_image(found):
    with pytest.raises(ConfigError, match="60x50"):
        found.draw(np.zeros((50, 60, 3), np.uint8))
    found = Predictions(found.boxes, found.scores, found.class_ids, (80, 100), found.names)
    with pytest.raises(ConfigError, match="give the image"):
        found.draw()


@pytest.mark.parametrize("side", [1, 8, 100, 3000])
def test_drawing_fits_any_size(found, side):
    """Boxes reach beyond the image, names are longer than it; the given image is not changed."""
    image = np.full((side, side, 3), 40, np.uint8)
    boxes = found.boxes * side / 60 - 0.2 * side
    big = Predictions(boxes, found.scores, found.class_ids, (side, side), ("x" * 99, "y"))
    drawn = big.draw(image)
    assert drawn.shape == image.shape and (image == 40).all() and (drawn != 40).any()


def test_letters_beyond_ascii_are_drawn():
    """Two names of question marks' length look different, so neither is drawn as ????."""
    image = np.zeros((200, 300, 3), np.uint8)
    box = np.array([[20, 60, 150, 150]], np.float32)
    pictures = [
        Predictions(box, np.ones(1, np.float32), np.zeros(1, int), (200, 300), (name,)).draw(image)
        for name in ("щука", "линь", "????")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (pictures[a] != pictures[b]).any()


def test_name_without_letters_in_the_font_is_its_number():
    assert _drawable("汽车", 3) == "#3" and _drawable("дзета é", 3) == "дзета é"


def test_neighbouring_classes_have_different_colours():
    colours = [np.array(class_colour(k)) for k in range(12)]
    for a, b in itertools.pairwise(colours):
        assert np.abs(a - b).sum() > 150
