"""Classes, positive anchors, and the first loss against a freshly built model's."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.doctor.learning import (
    ClassCount,
    StepCost,
    class_counts,
    class_findings,
    first_loss,
    loss_findings,
    positive_findings,
    step_findings,
)
from retina_plugin.doctor.matches import MatchedSample, match_sample
from tests.doctor.examples import config, record

R = "MODEL.RETINANET."


def sample_of(positives, anchors, *, ignored=0):
    """Images with these numbers of positive anchors, all of class 0."""
    n = len(positives)
    return MatchedSample(
        images=n,
        anchors=anchors * n,
        ignored=ignored * n,
        positives={"p3": sum(positives), "p4": 0},
        boxes=n,
        boxes_without=0,
        anchors_N=(anchors,) * n,
        ignored_N=(ignored,) * n,
        positives_NK=tuple((count,) for count in positives),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"NORMALIZER": "per_image"},
        {"NORMALIZER": "per_gpu"},
        {"NORMALIZER": "global"},
        {"NORMALIZER": "ema"},
        {"CLS_LOSS": "CrossEntropy"},
        {"CLS_LOSS": "CrossEntropy", "FOCAL_LOSS_ALPHA": -1.0},
        {"CLS_LOSS": "FocalLossStar"},
        {"CLS_LOSS": "HingeLoss"},
        {"PRIOR_PROB": 0.5},
        {"FOCAL_LOSS_GAMMA": 0.5},
        {"ALPHA_PER_CLASS": [0.1 * k for k in range(1, 11)]},
    ],
    ids=str,
)
def test_first_loss_is_that_of_a_fresh_model(tiny_cfg, options):
    """Within 5 %: the untrained logits are not all equal."""
    tiny_cfg.SOLVER.IMS_PER_BATCH = 8
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "eager"  # the others have to be compiled first
    for name, value in options.items():
        tiny_cfg.MODEL.RETINANET[name] = value
    records = DatasetCatalog.get("digits_scenes_train")
    sample = match_sample(
        tiny_cfg, AnchorGrid.from_cfg(tiny_cfg), GroundTruth.from_records(records), 10
    )
    expected = first_loss(tiny_cfg, sample)
    torch.manual_seed(0)
    model = build_model(tiny_cfg).train()
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    with EventStorage() as storage, torch.no_grad():
        real = model([mapper(r) for r in records])["loss_cls"].item()
        parts = {name: value for name, (value, _) in storage.latest().items()}
    assert expected.total == pytest.approx(real, rel=0.05)
    assert expected.foreground == pytest.approx(parts["retinanet/cls_foreground"], rel=0.05)
    background = parts["retinanet/cls_background"]
    assert expected.background == pytest.approx(background, rel=0.1, abs=0.02 * real)


def test_first_loss_by_hand():
    """10 of 1000 anchors are positive, one class, cross entropy without alpha, pi = .5: log 2."""
    cfg = config(R + "CLS_LOSS", "CrossEntropy", R + "FOCAL_LOSS_ALPHA", -1.0)
    cfg.MODEL.RETINANET.merge_from_list(["PRIOR_PROB", 0.5, "NUM_CLASSES", 1])
    first = first_loss(cfg, sample_of([10], 1000, ignored=100))
    log2 = 0.6931471805599453
    assert first.foreground == pytest.approx(log2)
    assert first.background == pytest.approx(890 / 10 * log2)


def test_processes_share_the_batch():
    """per_gpu adds 1 an image; global divides by the positives of all."""
    cfg = config(R + "NORMALIZER", "ema", "SOLVER.IMS_PER_BATCH", 16)
    sample = sample_of([100], 10_000)
    one, eight = first_loss(cfg, sample), first_loss(cfg, sample, processes=8)
    # (.9 x 100 + .1 x 1600) / 1600 against (.9 x 100 + .1 x 200) / 200
    assert one.total / eight.total == pytest.approx((1600 / 250) / (200 / 110))


def test_ohem_has_no_first_loss():
    assert first_loss(config(R + "SAMPLER", "OHEM"), sample_of([10], 1000)) is None


@pytest.mark.parametrize(("prior", "severity"), [(0.01, Severity.NOTE), (0.5, Severity.WARNING)])
def test_prior_that_lets_the_background_swamp_the_loss(prior, severity):
    first = first_loss(config(R + "PRIOR_PROB", prior), sample_of([50], 200_000))
    (finding,) = loss_findings(first)
    assert finding.severity is severity and finding.where == "MODEL.RETINANET.PRIOR_PROB"


def test_positive_share():
    (finding,) = positive_findings(sample_of([10, 30], 1000, ignored=50))
    assert finding.what == (
        "20 of 1,000 anchors of an image are positive (2 %), 5 % are ignored; positive by level: "
        "p3 20, p4 0 (mean of 2 images)"
    )


def test_class_histogram():
    box = (1, 1, 20, 20)
    records = [
        record([box, box, box], classes=[0, 0, 2]),
        record([box], classes=[0]),
        record([box, box], classes=[-1, 7]),  # no classes of the dataset
    ]
    counts = class_counts(GroundTruth.from_records(records), ("a", "b", "c"))
    assert counts == (ClassCount("a", 3, 2), ClassCount("b", 0, 0), ClassCount("c", 1, 1))


def test_absent_and_rare_classes_are_named():
    counts = [ClassCount("much", 90_000, 900), ClassCount("none", 0, 0), ClassCount("few", 7, 3)]
    absent, rare = class_findings([*counts, ClassCount("some", 200, 90)])
    assert absent.severity is Severity.WARNING and "1 of 4 classes" in absent.what
    assert absent.what.endswith(": none")
    # the mean is 22,551 boxes; rarer than a hundredth of it is rare
    assert rare.severity is Severity.NOTE
    assert "2 of 4 classes are rare: few (7 boxes in 3 images), some (200" in rare.what


def test_long_lists_are_cut():
    (finding,) = class_findings([ClassCount("a", 99, 9), *[ClassCount("b", 0, 0)] * 30])
    assert finding.what.endswith("b, b and 20 more")


def test_balanced_classes_and_no_boxes_at_all_are_no_findings():
    assert list(class_findings([ClassCount("a", 30, 9), ClassCount("b", 40, 9)])) == []
    assert list(class_findings([ClassCount("a", 0, 0)])) == []


@pytest.mark.parametrize(("memory", "severity"), [(0.5, Severity.NOTE), (0.95, Severity.WARNING)])
def test_length_of_the_training(memory, severity):
    total = 16 * 2**30
    cost = StepCost(0.5, int(memory * total), total, 8, 1, "cpu (2 threads)")
    (finding,) = step_findings(config("SOLVER.MAX_ITER", 72_000, "SOLVER.STEPS", ()), cost)
    assert finding.severity is severity
    assert "a step of 8 images takes 0.5 s" in finding.what and "takes 10.0 hours" in finding.what
