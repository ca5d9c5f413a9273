"""Learning rate, warm-up and length of a training."""

import pytest

from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.schedule import schedule_findings
from tests.doctor.examples import config

E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE


def found(key, *opts, images=117_266):
    """(severity, text) of the findings of a key."""
    findings = schedule_findings(config(*opts), images)
    return [(f.severity, str(f)) for f in findings if f.where == key]


def test_papers_schedule_is_right():
    """12.3 epochs of COCO."""
    findings = list(schedule_findings(config(), 117_266))
    assert [f.severity for f in findings] == [N]
    assert findings[0].what == "90,000 iterations of 16 images are 12.3 epochs of 117,266 images"


@pytest.mark.parametrize(
    ("batch", "rate", "weights", "severities"),
    [
        (16, 0.01, "x.pkl", []),
        (8, 0.005, "x.pkl", []),
        (8, 0.01, "x.pkl", []),  # twice the rule
        (8, 0.0125, "x.pkl", [N]),
        (2, 0.01, "x.pkl", [W]),  # the batch of one GPU with the rate of eight
        (64, 0.01, "x.pkl", [W]),
        (8, 0.03, "", [N]),  # from scratch
        (1, 0.01, "", [W]),
    ],
)
def test_linear_scaling_rule(batch, rate, weights, severities):
    options = ("SOLVER.IMS_PER_BATCH", batch, "SOLVER.BASE_LR", rate, "MODEL.WEIGHTS", weights)
    findings = found("SOLVER.BASE_LR", *options)
    assert [severity for severity, _ in findings] == severities
    for _, text in findings:
        assert f"set SOLVER.BASE_LR {0.01 * batch / 16:.4g}" in text


def test_rate_that_never_drops():
    assert [severity for severity, _ in found("SOLVER.STEPS", "SOLVER.STEPS", ())] == [N]
    cosine = ("SOLVER.STEPS", (), "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    assert found("SOLVER.STEPS", *cosine) == []


@pytest.mark.parametrize(
    ("warm_up", "severities"), [(500, []), (60_001, [W]), (20_000, [N]), (90_000, [])]
)
def test_warm_up(warm_up, severities):
    """At least MAX_ITER is a finding of ``check_config``."""
    findings = found("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_ITERS", warm_up)
    assert [severity for severity, _ in findings] == severities


def test_images_that_are_never_seen():
    ((severity, text),) = found("SOLVER.MAX_ITER", "SOLVER.MAX_ITER", 100, images=2000)
    assert severity is W and "0.8 epochs" in text and "400 images are never seen" in text
    assert "125 iterations are an epoch" in text


def test_no_images_no_epochs():
    assert found("SOLVER.MAX_ITER", images=0) == []
