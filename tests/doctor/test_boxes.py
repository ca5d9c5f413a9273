"""Boxes that cannot be meant, planted in an annotation file."""

import math

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from retina_plugin.doctor import quick_checks
from retina_plugin.doctor.boxes import as_boxes


def one(box):
    """The first annotation has this box."""

    def edit(content):
        content["annotations"][0]["bbox"] = box

    return edit


def every(function):
    """Every box becomes ``function(x, y, w, h)``."""

    def edit(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = function(*annotation["bbox"])

    return edit


ERRORS = {
    "NaN": ([1, 2, math.nan, 4], "boxes with NaN"),
    "infinite": ([1, 2, math.inf, 4], "boxes with an infinite number"),
    "minus infinity": ([-math.inf, 2, 3, 4], "boxes with an infinite number"),
    "infinite in float32": ([1, 2, 1e39, 4], "boxes with an infinite number"),
    "a huge whole number": ([1, 2, 10**400, 4], "boxes with an infinite number"),
    "huge": ([1, 2, 1e30, 4], "a hundred times as large"),
    "far away": ([1e7, 2, 5, 4], "a hundred times as large"),
    "negative sizes": ([60, 50, -5, -9], "boxes with a negative width or height"),
    "negative height": ([60, 50, 5, -9], "boxes with a negative width or height"),
    "3 numbers": ([1, 2, 3], "boxes that are not four numbers"),
    "5 numbers": ([1, 2, 3, 4, 5], "boxes that are not four numbers"),
    "no number": ([], "boxes that are not four numbers"),
    "strings": (["1", "2", "3", "4"], "boxes that are not four numbers"),
    "one string": ([1, 2, 3, "4"], "boxes that are not four numbers"),
    "nested": ([[1, 2, 3, 4]], "boxes that are not four numbers"),
    "a null": ([1, 2, None, 4], "boxes that are not four numbers"),
    "a record": ({"x": 1}, "boxes that are not four numbers"),
    "a text": ("1 2 3 4", "boxes that are not four numbers"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("fault", ERRORS)
def test_impossible_box_raises(coco, found, fault, split):
    """In a test set too: it would count as an object that is never found."""
    box, text = ERRORS[fault]
    (line,), _ = found(coco(one(box), split))
    assert line.startswith(MetadataCatalog.get(f"test_{split}").json_file)
    assert text in line and "(1 of " in line and "annotation 1 of 000001.png (64x64)" in line


WARNINGS = {
    "outside": ([70, 2, 5, 5], "boxes outside their image"),
    "half outside": ([60, 2, 20, 5], "leave their image by more than a pixel"),
    "no width": ([1, 2, 0, 5], "boxes without area"),
    "no size": ([1, 2, 0, 0], "boxes without area"),
    "thin": ([1, 2, 0.5, 5], "boxes thinner than a pixel"),
}


@pytest.mark.parametrize("fault", WARNINGS)
def test_doubtful_box_gives_a_warning(coco, found, fault):
    """Training and evaluation read it rightly."""
    box, text = WARNINGS[fault]
    errors, (line,) = found(coco(one(box)))
    assert errors == [] and text in line and "annotation 1 of 000001.png (64x64), [" in line


def test_edges_of_the_image_give_no_warning(coco, found):
    """A box as large as the image, and one that a rounding error lets leave it."""
    assert found(coco(one([0, 0, 64, 64]))) == ([], [])


def test_boxes_beyond_by_rounding_pass(coco, found):
    assert found(coco(one([-0.4, 20, 64.9, 44.5]))) == ([], [])


def test_boxes_as_corners_raise(coco, found):
    """[x1, y1, x2, y2] in place of [x, y, width, height]: one error, no flood of others."""
    (line,), warnings = found(coco(every(lambda x, y, w, h: [x, y, x + w, y + h])))
    assert "leave their image as [x, y, width, height] but fit as [x1, y1, x2, y2]" in line
    assert not [w for w in warnings if "leave" in w]


@pytest.mark.parametrize("split", ["train", "val"])
def test_relative_boxes_raise(coco, found, split):
    """Shares of the image in place of pixels."""
    edit = every(lambda x, y, w, h: [x / 64, y / 64, w / 64, h / 64])
    (line,), warnings = found(coco(edit, split))
    assert "all boxes lie between 0 and 1, as shares of the image" in line and warnings == []


def test_some_relative_boxes_give_a_warning(coco, found):
    """As boxes thinner than a pixel."""
    errors, (line,) = found(coco(one([0.1, 0.2, 0.3, 0.4])))
    assert errors == [] and "boxes thinner than a pixel (1 of" in line


def test_duplicates_are_counted(coco, found):
    """The same box of the same class and image; of another class it is none."""

    def edit(content):
        first = content["annotations"][0]
        for k in range(3):
            content["annotations"].append(first | {"id": 100 + k})
        content["annotations"].append(
            first | {"id": 200, "category_id": first["category_id"] % 10 + 1}
        )

    errors, (line,) = found(coco(edit))
    assert (
        errors == [] and "boxes that repeat another one of the same image and class (3 of" in line
    )


def test_near_duplicates_and_long_boxes_are_notes(coco):
    """Where hotcoco's health check finds them."""

    def edit(content):
        content["annotations"][0]["bbox"] = [1, 1, 40, 40]
        content["annotations"].append(
            content["annotations"][0] | {"id": 100, "bbox": [1, 1, 40, 41]}
        )
        content["annotations"].append(
            content["annotations"][0] | {"id": 101, "bbox": [1, 50, 60, 2]}
        )

    text = "\n".join(map(str, quick_checks(coco(edit))))
    assert "boxes with IoU above .95 with another one of their class (1 of" in text
    assert "boxes more than 20 times as long as they are wide" in text


def test_right_boxes_of_many_sizes_pass(coco, found):
    """Boxes anywhere in the image, half of them small: none of the guesses at a format fires."""
    rng = np.random.default_rng(0)

    def edit(content):
        first = content["annotations"][0]
        for k in range(500):
            x, y = rng.uniform(0, 60, 2).tolist()
            w, h = rng.uniform(1, 64 - x), rng.uniform(1, 64 - y)
            content["annotations"].append(first | {"id": 100 + k, "bbox": [x, y, w, h]})

    assert found(coco(edit)) == ([], [])


def test_boxes_of_several_types():
    """Lists, tuples, arrays and whole numbers are boxes."""
    boxes, unreadable = as_boxes([[1, 2, 3, 4], (1.5, 2, 3, 4), np.ones(4), "no", [1, 2, 3]])
    assert unreadable.tolist() == [False, False, False, True, True]
    assert boxes[:3].tolist() == [[1, 2, 3, 4], [1.5, 2, 3, 4], [1, 1, 1, 1]]
    assert np.isnan(boxes[3:]).all()
    assert as_boxes([])[0].shape == (0, 4)
