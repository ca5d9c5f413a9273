"""What differs between a checkpoint and the config on a resume: harmless, honoured, impossible."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer

from retina_plugin.engine import Trainer
from retina_plugin.errors import ConfigError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first test's training left behind; the others copy it."""
    return tmp_path_factory.mktemp("trained") / "output"


@pytest.fixture
def interrupted(tiny_cfg, trained):
    """The config of a training with a checkpoint after iteration 4 of 8."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 8, (6,)
    tiny_cfg.SOLVER.WARMUP_ITERS, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2, 4
    tiny_cfg.DATASETS.TEST = ()
    folder = tiny_cfg.OUTPUT_DIR
    if not trained.exists():
        tiny_cfg.OUTPUT_DIR = str(trained)
        trainer = Trainer(tiny_cfg)
        trainer.max_iter = 4
        trainer.train()
        (trained / "model_final.pth").unlink()
        (trained / "last_checkpoint").write_text("model_0000003.pth")
        tiny_cfg.OUTPUT_DIR = folder
    shutil.copytree(trained, folder)
    return tiny_cfg


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("retina_plugin.engine.hooks.Results._draw", lambda self, out: None)


def resume(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def learning_rates(cfg, trainer):
    """Of the iterations that are left, as the optimizer used them."""
    rates = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *args: rates.append(optimizer.param_groups[0]["lr"])
    )
    trainer.train()
    return rates


def test_same_config_is_not_mentioned(interrupted, log):
    assert resume(interrupted).start_iter == 4
    assert "differs" not in log.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [1, 1, 0.1, 0.1]),
        (["SOLVER.BASE_LR", 0.0025], [2, 2, 0.2, 0.2]),
        (["SOLVER.STEPS", (5,)], [1, 0.1, 0.1, 0.1]),
        (["SOLVER.STEPS", (4,)], [0.1, 0.1, 0.1, 0.1]),
        (["SOLVER.GAMMA", 0.5], [1, 1, 0.5, 0.5]),
        (["SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (8,)], [1, 1, 1, 1, 0.1, 0.1]),
        (["SOLVER.WARMUP_ITERS", 8, "SOLVER.STEPS", ()], [0.667, 0.75, 0.833, 0.917]),
    ],
)
def test_schedule_is_that_of_the_config(interrupted, log, options, expected):
    """From the first iteration after the resume on; Detectron2 keeps the old BASE_LR."""
    interrupted.merge_from_list(options)
    rates = learning_rates(interrupted, resume(interrupted))
    assert rates == pytest.approx([0.00125 * rate for rate in expected], rel=0.02)
    for key, value in zip(options[::2], options[1::2]):
        shown = re.escape(str(list(value) if isinstance(value, tuple) else value))
        assert re.search(rf"{key}: .* -> {shown} \(honoured from here on\)", log.text)


def test_hyperparameters_are_those_of_the_config_and_momenta_those_of_the_checkpoint(interrupted):
    saved = torch.load(Path(interrupted.OUTPUT_DIR, "model_0000003.pth"), weights_only=True)
    interrupted.SOLVER.MOMENTUM, interrupted.SOLVER.WEIGHT_DECAY = 0.5, 0.01
    optimizer = resume(interrupted).optimizer
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert 0.01 in {group["weight_decay"] for group in optimizer.param_groups}
    state = optimizer.state_dict()["state"]
    expected = saved["trainer"]["_trainer"]["optimizer"]["state"]
    assert state.keys() == expected.keys() and state
    for number, momenta in expected.items():
        assert torch.equal(state[number]["momentum_buffer"], momenta["momentum_buffer"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["MODEL.RETINANET.NUM_CONVS", 2], "MODEL.RETINANET.NUM_CONVS 1 (now 2)"),
        (["MODEL.RETINANET.NUM_CONVS", 0], "MODEL.RETINANET.NUM_CONVS 1 (now 0)"),
        (["MODEL.RETINANET.NORM", "BN"], "MODEL.RETINANET.NORM  (now BN)"),
        (["MODEL.BACKBONE.FREEZE_AT", 2], "MODEL.BACKBONE.FREEZE_AT 0 (now 2)"),
        (["MODEL.FPN.OUT_CHANNELS", 32], "MODEL.FPN.OUT_CHANNELS 16 (now 32)"),
        (["MODEL.RESNETS.DEPTH", 34], "MODEL.RESNETS.DEPTH 18 (now 34)"),
        (["SOLVER.WEIGHT_DECAY_NORM", 0.5], "SOLVER.WEIGHT_DECAY_NORM 0.0 (now 0.5)"),
        (["SOLVER.BIAS_LR_FACTOR", 2.0], "SOLVER.BIAS_LR_FACTOR 1.0 (now 2.0)"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]], "ANCHOR_GENERATOR.ASPECT_RATIOS"),
    ],
)
def test_other_model_or_groups_are_one_line(interrupted, options, named):
    """It names the key and the fix, and nothing was written."""
    folder = Path(interrupted.OUTPUT_DIR)
    before = sorted(folder.iterdir())
    interrupted.merge_from_list(options)
    if "SOLVER.WEIGHT_DECAY_NORM" in options:  # one group for all before, because both are 0
        interrupted.SOLVER.WEIGHT_DECAY_BIAS = 0.25
    with pytest.raises(ConfigError) as error:
        resume(interrupted)
    text = str(error.value)
    assert named in text and "\n" not in text
    checkpoint = str(folder / "model_0000003.pth")
    assert checkpoint in text and f"MODEL.WEIGHTS {checkpoint} and a new OUTPUT_DIR" in text
    assert sorted(folder.iterdir()) == before


def test_other_number_of_classes_is_one_line(interrupted):
    interrupted.DATASETS.TRAIN = ("digits_scenes_train",)
    trainer = Trainer(interrupted)
    trainer.checkpointer.model.head.cls_score = torch.nn.Conv2d(16, 63, 3)
    with pytest.raises(ConfigError, match=r"head.cls_score.weight of shape \(90, 16, 3, 3\), not"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("options", "text", "level"),
    [
        (["SOLVER.IMS_PER_BATCH", 4], "the batches are others", logging.WARNING),
        (["SEED", 5], "no effect: the checkpoint has the random numbers", logging.WARNING),
        (["INPUT.MIN_SIZE_TRAIN", (48,)], "the training sees other images", logging.WARNING),
        (["MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.0], "computes something else", logging.WARNING),
        (["DATALOADER.NUM_WORKERS", 1], "harmless", logging.INFO),
        (["TEST.EVAL_PERIOD", 1], "honoured", logging.INFO),
        (
            ["MODEL.WEIGHTS", "other.pth"],
            "no effect: the weights are the checkpoint's",
            logging.INFO,
        ),
    ],
)
def test_each_key_that_differs_is_listed(interrupted, log, options, text, level):
    interrupted.merge_from_list(options)
    assert resume(interrupted).start_iter == 4
    (record,) = [r for r in log.records if "differs from that of" in r.getMessage()]
    assert record.levelno == level
    (line,) = [row for row in record.getMessage().splitlines() if options[0] in row]
    assert text in line


def test_other_output_dir_is_not_mentioned(interrupted, log, tmp_path):
    """A folder may be renamed."""
    Path(interrupted.OUTPUT_DIR).rename(tmp_path / "renamed")
    interrupted.OUTPUT_DIR = str(tmp_path / "renamed")
    assert resume(interrupted).start_iter == 4
    assert "differs" not in log.text


def test_checkpoint_of_detectron2s_trainer_is_resumed(tiny_cfg, log):
    """With a line about what is not in it."""
    tiny_cfg.MODEL.META_ARCHITECTURE, tiny_cfg.DATASETS.TEST = "RetinaNet", ()
    trainer = DefaultTrainer(tiny_cfg)
    trainer.max_iter = 1
    trainer.train()
    tiny_cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    resumed = resume(tiny_cfg)
    assert resumed.start_iter == 1
    assert re.search(r"model_final.pth is of Detectron2's trainer or of an older version", log.text)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    resumed.train()
    assert resumed.iter == 2


def test_weights_alone_are_not_resumed(tiny_cfg):
    folder = Path(tiny_cfg.OUTPUT_DIR)
    folder.mkdir()
    torch.save({"model": Trainer.build_model(tiny_cfg).state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ConfigError, match="model_final.pth holds weights and no training"):
        resume(tiny_cfg)
