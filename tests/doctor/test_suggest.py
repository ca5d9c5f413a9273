"""Suggested anchors are better, by the same measure, on boxes that the config's do not fit."""

import numpy as np
import pytest
import yaml

from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.doctor.recall import anchor_fit
from retina_plugin.doctor.suggest import suggest_anchors, suggestion_findings
from retina_plugin.engine import setup_cfg
from tests.doctor.examples import config, random_records, record

NAMES = ("a", "b", "c")


def suggestion_of(cfg, records):
    grid, gt = AnchorGrid.from_cfg(cfg), GroundTruth.from_records(records)
    fit = anchor_fit(cfg, grid, gt, NAMES)
    return suggest_anchors(cfg, grid, gt, fit), fit


def boxes(width, height, seed=0):
    return random_records(np.random.default_rng(seed), width, height)


@pytest.fixture(scope="module")
def thin():
    """60 to 150 px long and 8 to 14 px high: what, its suggestion and its fit."""
    records = boxes((60, 150), (8, 14))
    return (records, *suggestion_of(config(), records))


def test_long_thin_boxes(thin):
    _, suggestion, fit = thin
    assert fit.total.upper < 0.1
    assert suggestion.then.upper > 0.9 and suggestion.anchors == suggestion.anchors_now == 9
    assert max(suggestion.ratios) < 0.5  # height over width


def test_tiny_boxes_get_smaller_anchors():
    suggestion, fit = suggestion_of(config(), boxes((14, 22), (14, 22)))
    assert fit.total.upper < 0.2
    assert suggestion.then.upper > 0.9 and not suggestion.resizes
    assert min(suggestion.sizes[0]) < 28


def test_boxes_of_one_shape_get_no_anchor_twice():
    suggestion, _ = suggestion_of(config(), boxes((80, 80), (10, 10)))
    assert len(set(suggestion.ratios)) == len(suggestion.ratios)
    assert suggestion.anchors == 3 * len(suggestion.ratios) and suggestion.then.upper == 1


def test_boxes_far_below_the_stride_also_get_larger_images():
    suggestion, fit = suggestion_of(config(), boxes((3, 5), (3, 5)))
    lines = yaml.safe_load(suggestion.yaml())
    assert lines["INPUT"]["MIN_SIZE_TRAIN"] == list(suggestion.min_sizes)
    assert lines["INPUT"]["MIN_SIZE_TEST"] == max(suggestion.min_sizes)
    assert suggestion.resizes and suggestion.min_sizes in [(320,), (640,)]
    assert fit.total.upper == 0 and suggestion.then.upper > 0.5


def test_pasted_lines_give_the_stated_recall(thin, tmp_path):
    records, suggestion, _ = thin
    file = tmp_path / "better.yaml"
    file.write_text(f"_BASE_: retina_R50_800.yaml\n{suggestion.yaml()}")
    cfg = setup_cfg(str(file), ["INPUT.MIN_SIZE_TRAIN", "(160,)"])
    fit = anchor_fit(cfg, AnchorGrid.from_cfg(cfg), GroundTruth.from_records(records), NAMES)
    assert (fit.total.lower, fit.total.upper) == (suggestion.then.lower, suggestion.then.upper)


def test_anchors_that_fit_are_left_alone():
    assert suggestion_of(config(), boxes((30, 60), (30, 60)))[0] is None


def test_generator_of_ones_own_is_left_alone(thin):
    """It need not have sizes and ratios."""
    records, _, fit = thin
    grid, gt = AnchorGrid.from_cfg(config()), GroundTruth.from_records(records)
    own = AnchorGrid.from_generator(
        lambda features: grid.generator(features), grid.names, grid.strides, 32
    )
    assert suggest_anchors(config(), own, gt, fit) is None


def test_finding_states_the_gain(thin):
    _, suggestion, fit = thin
    (finding,) = suggestion_findings(suggestion, fit)
    assert finding.severity is Severity.WARNING
    assert "with the same 9 anchors at a location" in finding.what


def test_suggestion_is_repeatable(thin):
    records, suggestion, _ = thin
    assert suggestion_of(config(), records)[0] == suggestion


def test_single_box():
    """Nothing to average over."""
    suggestion, _ = suggestion_of(config(), [record([(20, 20, 29, 90)])])
    assert (suggestion.now.upper, suggestion.then.upper) == (0, 1)
