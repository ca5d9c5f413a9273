"""The image size at which a class would fit."""

import numpy as np
import pytest

from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.doctor.image_size import scaled_sizes, size_findings
from retina_plugin.doctor.recall import anchor_fit
from tests.doctor.examples import config, random_records, record

NAMES = ("car", "ant")


def findings_of(records, *opts):
    cfg = config(*opts)
    grid, gt = AnchorGrid.from_cfg(cfg), GroundTruth.from_records(records)
    return list(size_findings(cfg, grid, gt, anchor_fit(cfg, grid, gt, NAMES), NAMES))


def cars_and_ants(side):
    """24 cars of 40 px, which fit; 24 ants of ``side`` px."""
    boxes = [(40.0, 40, 80, 80), (32.0, 32, 32 + side, 32 + side)]
    return [record(boxes, classes=[0, 1]) for _ in range(24)]


def test_sentence_says_at_which_size_a_class_fits():
    """At 160 px no anchor has IoU .5 with a box of 16 px, at 320 px it has the anchor's size."""
    (finding,) = findings_of(cars_and_ants(14))
    assert finding.severity is Severity.WARNING and finding.where == "INPUT.MIN_SIZE_TRAIN"
    assert finding.what == (
        "class 'ant': 100 % of its 24 boxes lie below IoU 0.5 at 160 px, and 0 % at 320 px"
    )
    assert 'set INPUT.MIN_SIZE_TRAIN "(320,)"' in finding.fix and "4 times" in finding.fix


def test_smallest_size_that_is_enough_is_named():
    (finding,) = findings_of(cars_and_ants(20))
    assert finding.what.endswith("and 0 % at 240 px")


def test_class_of_wrong_shape_gets_no_size():
    rng = np.random.default_rng(0)
    found = findings_of(random_records(rng, (100, 140), (8, 10), num_classes=1))
    assert len(found) == 1 and "and still" in found[0].what
    assert found[0].fix.startswith("another size does not help: take other MODEL.ANCHOR_GENERATOR")


def test_classes_that_fit_and_classes_of_few_boxes_are_not_named():
    assert findings_of(cars_and_ants(30)) == []
    assert findings_of(cars_and_ants(8)[:9]) == []


def test_images_that_are_not_resized_have_no_other_size():
    (finding,) = findings_of(cars_and_ants(14), "INPUT.MIN_SIZE_TRAIN", (0,))
    assert finding.what.endswith("at 0 (not resized)")


def test_longest_side_grows_where_it_would_undo_the_size():
    gt = GroundTruth.from_records([record([(1, 1, 9, 9)], shape=(100, 200))])
    cfg = config("INPUT.MAX_SIZE_TRAIN", 400)
    assert scaled_sizes(cfg, gt, [160], 2) == ([320], 640)
    assert scaled_sizes(cfg, gt, [160], 1.2) == ([192], 400)


@pytest.mark.parametrize("sampling", ["choice", "range"])
def test_setting_has_the_form_of_the_sampling(sampling):
    options = ("INPUT.MIN_SIZE_TRAIN", (150, 170), "INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling)
    (finding,) = findings_of(cars_and_ants(14), *options)
    assert 'set INPUT.MIN_SIZE_TRAIN "(300, 340)"' in finding.fix
