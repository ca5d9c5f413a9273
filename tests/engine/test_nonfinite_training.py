"""Whole trainings in which something is not finite: no checkpoint ever holds it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.engine import Trainer
from retina_plugin.engine.finite import NonFiniteError
from retina_plugin.engine.step_record import StepRecord

PARAMETER = "backbone.fpn_lateral3.weight"


class Spoil(HookBase):
    """Makes one iteration not finite."""

    def __init__(self, at, fault):
        self.at, self.fault = at, fault

    def before_train(self):
        trainer = self.trainer._trainer
        self.now = lambda: trainer.iter == self.at
        model = trainer.model
        if self.fault == "gradient":
            trainer.after_backward = self.all_gradients
        elif self.fault == "large gradient":
            trainer.after_backward = lambda: self.all_gradients(1e20)
        elif self.fault == "parameter":
            parameter = dict(model.named_parameters())[PARAMETER]
            parameter.register_hook(lambda g: g * torch.nan if self.now() else None)
        elif self.fault == "loss":
            forward = model.forward

            def infinite(batch):
                losses = forward(batch)
                return losses | {"loss_cls": losses["loss_cls"] + torch.inf}

            model.forward = lambda batch: (infinite if self.now() else forward)(batch)

    def all_gradients(self, value=torch.nan):
        if self.now():
            for p in self.trainer.model.parameters():
                if p.grad is not None:
                    p.grad.fill_(value)


def train(cfg, *hooks, log_period=1, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer._trainer.log_period = log_period
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.SEED = 1
    tiny_cfg.SOLVER.MAX_ITER = 4  # an epoch: each image once
    tiny_cfg.MODEL.RESNETS.NORM = "BN"
    tiny_cfg.MODEL.RETINANET.NORMALIZER = "ema"
    return tiny_cfg


@pytest.fixture
def spoil_image(monkeypatch, cfg):
    """``spoil_image(at)``: the second image of an iteration has a NaN; returns its file name."""

    def spoil(at):
        seed_all_rng(cfg.SEED)
        batches = list(itertools.islice(iter(Trainer(cfg).data_loader), at + 1))
        name = batches[at][1]["file_name"]
        mapper = DATASET_MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)
        call = mapper.__call__

        def spoiled(self, record):
            mapped = call(self, record)
            if mapped["file_name"] == name and self.is_train:
                mapped["image"] = mapped["image"].float()
                mapped["image"][1, 2, 3] = torch.nan
            return mapped

        monkeypatch.setattr(mapper, "__call__", spoiled)
        return name

    return spoil


def is_finite(value):
    """No tensor or number in nested containers is NaN or infinite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, float):
        return abs(value) < float("inf")
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(is_finite, value))


def check_files(cfg, at):
    """Every checkpoint is finite and of before the step; nothing of a finished training is there.

    Returns:
        The iterations of the checkpoints.
    """
    out, iterations = Path(cfg.OUTPUT_DIR), []
    for path in out.glob("*.pth"):
        checkpoint = torch.load(path, weights_only=False)
        assert is_finite(checkpoint["model"]) and is_finite(checkpoint["trainer"]), path
        iterations.append(checkpoint["iteration"])
    assert all(i < at for i in iterations)
    last = out / "last_checkpoint"
    if iterations:
        assert last.read_text() == f"model_{max(iterations):07d}.pth"
    assert last.exists() == bool(iterations)
    unfinished = ["model_final.pth", "model_best.pth", "inference", "training_curves.png"]
    assert not [name for name in unfinished if (out / name).exists()]
    assert "NaN" not in (out / "metrics.json").read_text()
    return sorted(iterations)


FAULTS = ["pixels", "loss", "gradient", "parameter"]
# Fault, iteration, CHECKPOINT_PERIOD, log period. Every combination is in the slow suite.
SOME = [
    ("pixels", 2, 1, 20),
    ("pixels", 3, 5, 1),
    ("loss", 0, 2, 1),
    ("gradient", 3, 2, 20),
    ("parameter", 2, 1, 1),
    ("parameter", 3, 5, 20),
]
REST = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(FAULTS, (0, 2, 3), (1, 2, 5), (1, 20))
    if case not in SOME
]


@pytest.mark.parametrize(("fault", "at", "period", "log_period"), SOME + REST)
def test_no_checkpoint_is_spoiled(cfg, spoil_image, fault, at, period, log_period):
    """At any iteration, CHECKPOINT_PERIOD and log period; also in the last iteration."""
    cfg.SOLVER.CHECKPOINT_PERIOD = period
    name = spoil_image(at) if fault == "pixels" else ""
    with pytest.raises(NonFiniteError, match=f"iteration={at} ") as caught:
        train(cfg, Spoil(at, fault), log_period=log_period)
    text = str(caught.value)
    assert check_files(cfg, at) == [i for i in range(at) if (i + 1) % period == 0]
    record = StepRecord.read(Path(cfg.OUTPUT_DIR) / f"nonfinite_{at:07d}.json")
    assert len(record.processes[0].samples) == 2
    if fault == "pixels":
        assert f"it begins in the pixels, seen on level p3, p4, p5, p6, p7; image {name}: " in text
    elif fault == "loss":
        assert "): loss_cls inf" in text
    else:
        assert "the losses are finite" in text
        if log_period == 1 and fault == "parameter":
            assert f"the gradient of {PARAMETER}; images " in text


@pytest.mark.parametrize("log_period", [pytest.param(1, marks=pytest.mark.slow), 20])
def test_training_resumes_once_the_cause_is_gone(cfg, tmp_path, log_period):
    """From the last checkpoint, as if nothing had happened: to the bit."""
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    with pytest.raises(NonFiniteError):
        train(cfg, Spoil(3, "gradient"), log_period=log_period)
    resumed = train(cfg, resume=True)
    cfg.OUTPUT_DIR = str(tmp_path / "clean")
    expected = train(cfg)
    for ours, theirs in zip(
        resumed.model.state_dict().values(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=[pytest.mark.slow] * (x != "pixels")) for x in FAULTS]
)
def test_skipped_steps_do_not_end_a_training(cfg, spoil_image, fault):
    """Its files are those of a finished training, with the number of skipped steps."""
    cfg.SOLVER.MAX_SKIPPED_STEPS, cfg.DATASETS.TEST = 3, ()
    if fault == "pixels":
        spoil_image(1)
    trainer = train(cfg, Spoil(1, fault))
    final = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=False)
    assert is_finite(final["model"]) and is_finite(final["trainer"])
    assert final["trainer"]["_trainer"]["skipped_steps"] == 1
    assert trainer.scheduler.last_epoch == 4  # the schedule goes by iterations
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    assert (Path(cfg.OUTPUT_DIR) / "nonfinite_0000001.json").is_file()


@pytest.mark.parametrize("log_period", [1, 20])
def test_learning_rate_that_is_much_too_high(cfg, log_period):
    """Weights grow until a loss is not finite. The error says so, and checkpoints are finite."""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.CHECKPOINT_PERIOD = 1e6, 1
    cfg.SOLVER.MAX_ITER = 12
    with pytest.raises(NonFiniteError, match="weights are up to .*set a lower SOLVER.BASE_LR"):
        train(cfg, log_period=log_period)
    check_files(cfg, 12)


@pytest.mark.parametrize(("period", "end"), [(1, 3), (5000, 1)])
def test_weights_that_overflow_are_not_saved(cfg, period, end):
    """Although loss and gradients are finite. The next loss would tell, but there may be none."""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.CHECKPOINT_PERIOD = 1e30, period
    cfg.SOLVER.MAX_ITER = end
    with pytest.raises(NonFiniteError, match="iteration=0 .*the weights after the step") as caught:
        train(cfg, Spoil(0, "large gradient"))
    assert "SOLVER.BASE_LR" in str(caught.value)
    assert check_files(cfg, 0) == []
