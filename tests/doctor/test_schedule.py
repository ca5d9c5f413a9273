"""Learning rate, warm-up and length of a training."""

import pytest
from detectron2.engine import DefaultTrainer

from retina_plugin.doctor.findings import Severity
from retina_plugin.doctor.schedule import check_scaled, schedule_findings
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


def scaled(processes, *opts):
    """Findings of a config for 8 GPUs on so many processes."""
    cfg = config("SOLVER.REFERENCE_WORLD_SIZE", 8, *opts)
    return list(check_scaled(cfg, DefaultTrainer.auto_scale_workers(cfg, processes)))


def test_what_the_scaled_training_has():
    (finding,) = scaled(1)
    assert finding.severity is N
    assert str(finding) == (
        "SOLVER.REFERENCE_WORLD_SIZE: 8, but here is 1 process, with SOLVER.IMS_PER_BATCH 2, "
        "BASE_LR 0.00125, MAX_ITER 720000, STEPS (480000, 640000) and WARMUP_ITERS 4000"
    )
    assert scaled(8) == []


@pytest.mark.parametrize(
    ("processes", "opts", "says"),
    [
        (
            1,
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 0.01],
            "SOLVER.BASE_LR_END: must be a number from 0 to SOLVER.BASE_LR 0.00125, got 0.01",
        ),
        (
            16,
            ["SOLVER.MAX_ITER", 9, "SOLVER.WARMUP_ITERS", 8, "SOLVER.RESCALE_INTERVAL", True]
            + ["SOLVER.STEPS", ()],
            "SOLVER.WARMUP_ITERS: 4 is not below SOLVER.MAX_ITER 4: SOLVER.RESCALE_INTERVAL True",
        ),
        (
            16,
            ["SOLVER.CHECKPOINT_PERIOD", 1],
            "SOLVER.CHECKPOINT_PERIOD: must be a whole number from 1 on, got 0",
        ),
        (
            16,
            ["SOLVER.STEPS", "(3, 4)"],
            "SOLVER.STEPS: must be a list of whole numbers from 1 on, each greater than the one",
        ),
    ],
)
def test_schedule_that_is_impossible_once_it_is_scaled(processes, opts, says):
    _, error = scaled(processes, *opts)
    assert error.severity is E and str(error).startswith(says)
    of = "1 process" if processes == 1 else "16 processes"
    assert str(error).endswith(
        f"(SOLVER.REFERENCE_WORLD_SIZE 8 scaled it to {of}): change it, or set "
        f"SOLVER.REFERENCE_WORLD_SIZE 0 and the schedule of {of}"
    )
