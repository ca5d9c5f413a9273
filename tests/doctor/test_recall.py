"""Recall of boxes whose best IoU is known, and the matcher's sample."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.doctor.matches import has_anchors, iou_limits, match_sample
from retina_plugin.doctor.recall import anchor_findings, anchor_fit, percent, pixels
from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import IGNORED
from tests.doctor.examples import config, record

NAMES = ("bird", "fish")

# One anchor of 32 px at every location of p3, so that IoUs are those of a square on a grid.
ONE_SQUARE = (
    "MODEL.RETINANET.IN_FEATURES",
    ["p3"],
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[32.0]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    [[1.0]],
)
EXACT = (16.0, 16, 48, 48)  # IoU 1
IGNORABLE = (16.0, 16, 48, 31)  # 15 / 32 = .469, between the thresholds
THIN = (16.0, 16, 24, 48)  # 8 / 32 = .25


def fit_of(records, *opts):
    cfg = config(*ONE_SQUARE, *opts)
    return anchor_fit(cfg, AnchorGrid.from_cfg(cfg), GroundTruth.from_records(records), NAMES)


def test_recall_of_all():
    fit = fit_of([record([EXACT, IGNORABLE, THIN, EXACT])])
    assert (fit.lower_iou, fit.upper_iou) == (0.4, 0.5)
    assert (fit.total.boxes, fit.total.lower, fit.total.upper) == (4, 0.75, 0.5)


def test_recall_by_class():
    fit = fit_of([record([EXACT, IGNORABLE, THIN], classes=[0, 0, 1])])
    rows = [(g.name, g.boxes, g.lower, g.upper) for g in fit.by_class]
    assert rows == [("bird", 2, 1, 0.5), ("fish", 1, 0, 0)]


def test_class_without_boxes_has_an_empty_row():
    fit = fit_of([record([EXACT])])
    assert (fit.by_class[1].name, fit.by_class[1].boxes) == ("fish", 0)


def test_recall_by_size():
    """Areas 32 x 15, 32 x 32 (COCO: medium from 32 px on) and 130 x 130."""
    fit = fit_of([record([IGNORABLE, EXACT, (0, 0, 130, 130)])])
    assert [(g.boxes, g.upper) for g in fit.by_size] == [(1, 0), (1, 1), (1, 0)]


def test_recall_by_ratio():
    """h/w is 15/32 for the first box, 1, and 4."""
    fit = fit_of([record([IGNORABLE, EXACT, THIN])])
    assert [g.boxes for g in fit.by_ratio] == [0, 1, 0, 1, 0, 1]
    assert fit.by_ratio[1].lower == 1 and fit.by_ratio[5].lower == 0


def test_boxes_are_resized():
    """At 320 px the box of 16 px has the anchor's size."""
    small = record([(8.0, 8, 24, 24)])
    assert fit_of([small]).total.lower == 0
    assert fit_of([small], "INPUT.MIN_SIZE_TRAIN", (320,)).total.upper == 1


def test_longest_side_limits_the_resizing():
    small = record([(8.0, 8, 24, 24)])
    options = ("INPUT.MIN_SIZE_TRAIN", (320,), "INPUT.MAX_SIZE_TRAIN", 160)
    assert fit_of([small], *options).total.upper == 0


def test_several_training_sizes_are_averaged():
    fit = fit_of([record([(8.0, 8, 24, 24)])], "INPUT.MIN_SIZE_TRAIN", (160, 320, 320, 640))
    assert fit.total.upper == 0.5 and fit.total.boxes == 1
    assert [(g.name, g.upper) for g in fit.by_training_size] == [
        ("160 px", 0),
        ("320 px", 1),
        ("320 px", 1),
        ("640 px", 0),
    ]
    # small at 160 px, medium at the others
    assert [g.boxes for g in fit.by_size] == [0.25, 0.75, 0]


def test_boxes_that_no_anchor_reaches_are_named():
    records = [record([EXACT]), record([THIN, THIN], name="b.jpg", classes=[1, 0])]
    fit = fit_of(records)
    assert fit.unreached == 2
    first = fit.unreached_first[0]
    assert (first.file, first.label, first.width, first.height) == ("b.jpg", "fish", 8, 32)
    assert first.iou == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("thresholds", "labels", "limits"),
    [
        ([0.4, 0.5], [0, -1, 1], (0.4, 0.5)),
        ([0.3, 0.7], [0, -1, 1], (0.3, 0.7)),
        ([0.5], [0, 1], (0.5, 0.5)),
        ([0.1, 0.4, 0.5], [0, 0, -1, 1], (0.4, 0.5)),
    ],
)
def test_limits_are_the_configs(thresholds, labels, limits):
    cfg = config("MODEL.RETINANET.IOU_THRESHOLDS", thresholds, "MODEL.RETINANET.IOU_LABELS", labels)
    assert iou_limits(cfg) == limits


def test_labels_without_a_positive_one_raise():
    with pytest.raises(ConfigError, match="IOU_LABELS .* has no 1"):
        iou_limits(config("MODEL.RETINANET.IOU_LABELS", [0, -1, -1]))


@pytest.mark.parametrize("low_quality", ["always", "above_background", "never"])
def test_sample_counts_what_the_models_labeler_gives(tiny_cfg, low_quality):
    tiny_cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES = low_quality
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (6, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(3, 40, (6, 4, 2))], axis=2).clip(max=64)
    records = [record(b.tolist(), shape=(64, 64), classes=[0, 1, 2, 2]) for b in boxes]
    sample = match_sample(
        tiny_cfg, AnchorGrid.from_cfg(tiny_cfg), GroundTruth.from_records(records), 10
    )
    model = build_model(tiny_cfg)
    features = [torch.empty(1, 1, s, s) for s in (8, 4, 2, 1, 1)]
    anchors = Boxes.cat(model.anchor_generator(features)).tensor
    truth = []
    for b in boxes:
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.from_numpy(b).float())
        instances.gt_classes = torch.tensor([0, 1, 2, 2])
        truth.append(instances)
    labels = model.labeler(anchors, truth).label_NR
    of_image = [torch.bincount(row[row >= 0], minlength=10).tolist() for row in labels]
    assert sample.positives_NK == tuple(map(tuple, of_image))
    assert sample.ignored == int((labels == IGNORED).sum())
    assert sample.anchors == labels.numel() and sample.boxes == 24
    assert sum(sample.positives.values()) == int((labels >= 0).sum()) > 0
    assert list(sample.positives) == ["p3", "p4", "p5", "p6", "p7"]


def test_boxes_without_a_positive_anchor():
    """Only "always" gives the thin box one, and none to its twin at the same place."""
    counts = [
        fit_of(
            [record([EXACT, THIN, THIN])], "MODEL.RETINANET.LOW_QUALITY_MATCHES", low_quality
        ).sample.boxes_without
        for low_quality in ("never", "above_background", "always")
    ]
    assert counts == [2, 2, 1]


def test_detectron2s_retinanet_always_takes_low_quality_matches():
    cfg = config("MODEL.META_ARCHITECTURE", "RetinaNet", *ONE_SQUARE)
    assert has_anchors(cfg) and cfg.MODEL.RETINANET.LOW_QUALITY_MATCHES != "always"
    gt = GroundTruth.from_records([record([THIN])])
    fit = anchor_fit(cfg, AnchorGrid.from_cfg(cfg), gt, NAMES)
    assert fit.low_quality == "always" and fit.sample.boxes_without == 0


@pytest.mark.parametrize("name", ["GeneralizedRCNN", "FCOS", "Unknown"])
def test_other_detectors_have_no_such_anchors(name):
    assert not has_anchors(config("MODEL.META_ARCHITECTURE", name))


def findings_of(*args):
    return {(f.severity, f.what): f.fix for f in anchor_findings(fit_of(*args))}


def test_finding_states_the_recall():
    found = findings_of([record([EXACT] * 19 + [IGNORABLE])])
    assert (
        Severity.NOTE,
        "95.0 % of 20 boxes have an anchor with IoU >= 0.5 (positive), 100 % one with >= 0.4 (not "
        "background), at INPUT.MIN_SIZE_TRAIN 160 px",
    ) in found


def test_finding_names_unreached_boxes_and_what_low_quality_matches_do():
    found = findings_of([record([EXACT, THIN])])
    fix = found[
        Severity.WARNING,
        "1 boxes (50.0 %) have no anchor with IoU >= 0.4 at INPUT.MIN_SIZE_TRAIN 160 px; the "
        "first: a.jpg: 'bird', 8 x 32 px, IoU 0.25",
    ]
    assert "above_background asks for this IoU" in fix


def test_no_positive_anchor_at_all_is_an_error():
    errors = [what for (severity, what) in findings_of([record([THIN])]) if severity == "error"]
    assert len(errors) == 1 and "no anchor is positive in 1 images with 1 boxes" in errors[0]


def test_unused_levels_are_named():
    cfg = config()
    gt = GroundTruth.from_records([record([EXACT])])
    fit = anchor_fit(cfg, AnchorGrid.from_cfg(cfg), gt, NAMES)
    assert any("on p4, p5, p6, p7" in f.what for f in anchor_findings(fit))


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100 %"), (0.9999, "> 99.9 %"), (0.5, "50.0 %"), (0.0001, "< 0.1 %"), (0, "0 %")],
)
def test_percent_rounds_neither_to_all_nor_to_none(share, text):
    assert percent(share) == text


def test_pixels():
    assert [pixels(s) for s in ([800], [640, 800, 700], [0])] == [
        "800 px",
        "640 to 800 px",
        "0 (not resized)",
    ]
