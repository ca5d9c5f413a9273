"""What the tests share: one thread, no cache outside a temporary folder, a tiny set and model."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # train_net, from whatever folder pytest was started

# Importing the package registers the embedded dataset's paths, so the cache is chosen before: no
# test reads or fills the user's. Subprocesses inherit it.
_CACHE = tempfile.mkdtemp(prefix="retina_plugin_tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["RETINA_PLUGIN_CACHE"] = _CACHE

from retina_plugin.data import digits  # noqa: E402
from retina_plugin.engine import setup_cfg  # noqa: E402

torch.set_num_threads(1)

_LOGGERS = ("detectron2", "fvcore", "retina_plugin")


@pytest.fixture(scope="session")
def repo():
    """The checkout's root."""
    return REPO


@pytest.fixture(scope="session")
def tiny_digits():
    """digits_scenes_{train,dev,val} with 8, 4, 4 images of 64 px, not thousands; their folder.

    The tiny scenes lie where the full ones would, so the names work as they are, here and in
    subprocesses.
    """
    root = digits.dataset_root()
    if not root.is_dir():
        sizes = {"image_size": 64, "max_side": 40, "max_digits": 3}
        tiny = digits.SceneSpec(num_train=8, num_dev=4, num_val=4, **sizes)
        digits.prepare(tiny).rename(root)
    return root


@pytest.fixture
def tiny_cfg(tiny_digits, tmp_path):
    """A config that trains in moments: ResNet-18 of width 16 on the tiny digits, on the CPU."""
    cfg = setup_cfg(str(REPO / "configs" / "_base_" / "retinanet.yaml"))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SEED = 1
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_scenes_train",), ("digits_scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.PIXEL_STD = [57.375, 57.120, 58.395]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM = 18, "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[s, s * 1.26, s * 1.59] for s in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 10, 1
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.00125
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 2, (), 0
    cfg.TEST.EVAL_PERIOD = 0
    return cfg


@pytest.fixture(autouse=True)
def _restore_loggers():
    """Detectron2's ``setup_logger`` adds a handler for every output folder; undo it."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture
def log(caplog):
    """caplog that sees each record of our loggers once, whether ``setup_logger`` was called or not:
    that stops their propagation."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    return caplog
