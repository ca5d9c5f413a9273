"""Boxes as training sees them, and Detectron2's resizing."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode

from retina_plugin.data import FastMapper
from retina_plugin.doctor.ground_truth import GroundTruth, resized_shapes, training_sizes
from tests.doctor.examples import config, record


def test_boxes_are_those_of_the_mapper(tiny_cfg):
    """Resized from 64 to 96 px."""
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    records = DatasetCatalog.get("digits_scenes_train")
    mapper = FastMapper(**FastMapper.from_config(tiny_cfg, is_train=True))
    boxes_G4, shapes_I2 = GroundTruth.from_records(records).resized(96, 1333)
    seen = [mapper(r)["instances"] for r in records]
    assert [i.image_size for i in seen] == [tuple(shape) for shape in shapes_I2]
    expected = np.concatenate([i.gt_boxes.tensor.numpy() for i in seen])
    np.testing.assert_allclose(boxes_G4, expected, atol=1e-4)


@pytest.mark.parametrize(("short", "longest"), [(800, 1333), (160, 200), (37, 10_000), (0, 100)])
def test_resized_shapes_equal_detectron2s(short, longest):
    shapes = np.random.default_rng(0).integers(1, 3000, (500, 2))
    shapes[:3] = (100, 100), (1, 2999), (333, 333)
    expected = shapes
    if short:
        resize = ResizeShortestEdge.get_output_shape
        expected = np.array([resize(h, w, short, longest) for h, w in shapes.tolist()])
    assert np.array_equal(resized_shapes(shapes, short, longest), expected)


def test_boxes_are_clipped_to_the_image():
    gt = GroundTruth.from_records([record([(-10, 5, 500, 20)])])
    assert gt.boxes_G4.tolist() == [[0, 5, 160, 20]]


def test_width_and_height_become_corners():
    box = {"bbox": [10, 20, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    gt = GroundTruth.from_records([{"height": 100, "width": 100, "annotations": [box]}])
    assert gt.boxes_G4.tolist() == [[10, 20, 40, 60]] and gt.classes_G.tolist() == [2]


UNSEEN = [
    {"iscrowd": 1},
    {"bbox": [10, 10, 10, 20]},
    {"bbox": [200, 10, 220, 20]},
    {"bbox": [30, 10, 20, 20]},
    {"bbox": [float("nan"), 10, 20, 20]},
    {"bbox": [1, 2, 3]},
    {"bbox": [1, 2, 3, 4, 5], "bbox_mode": BoxMode.XYWHA_ABS},
    {"bbox": "abcd"},
    {"bbox": None},
    {"bbox_mode": BoxMode.XYWH_REL},
    {"category_id": "3"},
]


@pytest.mark.parametrize("change", UNSEEN, ids=str)
def test_what_training_does_not_see_is_dropped_and_counted(change):
    good = record([(10, 10, 40, 40), (20, 20, 60, 60)])
    good["annotations"][0].update(change)
    gt = GroundTruth.from_records([good])
    assert gt.boxes_G4.tolist() == [[20, 20, 60, 60]] and gt.num_dropped == 1


@pytest.mark.parametrize(
    "broken", [None, {}, {"height": 0, "width": 10}, {"height": "9", "width": 9}], ids=str
)
def test_record_without_a_size_is_left_out(broken):
    gt = GroundTruth.from_records([broken, record([(1, 1, 9, 9)])])
    assert gt.files == ("a.jpg",) and gt.image_G.tolist() == [0]


def test_no_records_give_no_boxes():
    gt = GroundTruth.from_records([])
    assert gt.boxes_G4.shape == (0, 4) and gt.resized(100, 200)[0].shape == (0, 4)


def test_training_sizes():
    assert training_sizes(config("INPUT.MIN_SIZE_TRAIN", (640, 800))) == [640, 800]
    ranged = config("INPUT.MIN_SIZE_TRAIN", (600, 800), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    assert training_sizes(ranged) == [600, 650, 700, 750, 800]
