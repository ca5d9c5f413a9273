"""Shared by all tests: one thread, a temporary cache folder, a tiny dataset and model."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # train_net, from whatever folder pytest was started

# Chosen before the package is imported, which registers the embedded dataset's paths. No test reads
# or fills the user's cache. Subprocesses inherit the variable.
_CACHE = tempfile.mkdtemp(prefix="retina_plugin_tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["RETINA_PLUGIN_CACHE"] = _CACHE

from detectron2.modeling import build_model  # noqa: E402

from retina_plugin.data import digits  # noqa: E402
from retina_plugin.engine import setup_cfg  # noqa: E402

torch.set_num_threads(1)

# Each fuzz test tries a multiple of its profile's number of inputs. `quick` and `long` try the same
# ones in every run, because they gate changes: `make test-slow` chooses `long`. `new` tries others
# each time; a failing one is kept in .hypothesis and tried first in the next run.
_ANY = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
_SAME = {"derandomize": True, "database": None}
hypothesis.settings.register_profile("quick", max_examples=3, **_SAME, **_ANY)
hypothesis.settings.register_profile("long", max_examples=100, **_SAME, **_ANY)
hypothesis.settings.register_profile("new", max_examples=100, print_blob=True, **_ANY)
hypothesis.settings.load_profile("quick")

_TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
]

_LOGGERS = ("detectron2", "fvcore", "retina_plugin")


@pytest.fixture(scope="session")
def repo():
    """The checkout's root."""
    return REPO


@pytest.fixture(scope="session")
def tiny_digits():
    """The folder of digits_scenes_{train,dev,val} with 8, 4 and 4 images of 64 px.

    The tiny scenes lie where the full ones would, so the datasets' names work, in subprocesses too.
    """
    return _write_tiny_scenes(digits.dataset_root())


@pytest.fixture(scope="session")
def tiny_sparse():
    """The folder of digits_sparse_{train,dev,val} with the same tiny scenes."""
    return _write_tiny_scenes(digits.dataset_root(digits.SPARSE_SPEC))


def _write_tiny_scenes(root):
    if not root.is_dir():
        sizes = {"image_size": 64, "max_side": 40, "max_digits": 3}
        tiny = digits.SceneSpec(num_train=8, num_dev=4, num_val=4, **sizes)
        digits.prepare(tiny).rename(root)
        # Nothing is checked when it is read, because tests damage files on purpose.
        (root / digits.MANIFEST).write_text("{}")
    return root


@pytest.fixture
def tiny_cfg(tiny_digits, tmp_path):
    """A config that trains in moments: half the width of the demo's, on the tiny digits."""
    cfg = setup_cfg(str(REPO / "configs" / "_base_" / "digits_R18.yaml"))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = ""
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 0.00125
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 2, (), 0
    cfg.TEST.EVAL_PERIOD = 0
    return cfg


@pytest.fixture(scope="session")
def detector(repo):
    """detector(*overrides): a config, and its model with random weights, whose scores are spread.

    It finds something everywhere.
    """

    def build(*overrides):
        base = str(repo / "configs" / "_base_" / "digits_R18.yaml")
        cfg = setup_cfg(base, [*_TINY, *map(str, overrides)])
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():  # a batch norm as after a training
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        model.head.cls_score.weight.data.normal_(std=0.3, generator=generator)
        model.head.cls_score.bias.data.fill_(-2.0)
        model.head.bbox_pred.weight.data.normal_(std=0.02, generator=generator)
        return cfg, model

    return build


@pytest.fixture(scope="session")
def noise():
    """noise(n, h, w): (n, 3, h, w) float32 whole pixels, smooth enough to look like images."""

    def images(n, height, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(n, 3, height // 8 + 2, width // 8 + 2, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        return (fine * 255).round()

    return images


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
    """caplog that sees each record of our loggers once.

    Detectron2's ``setup_logger`` stops their propagation, so the handler is added to them directly.
    """
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    return caplog
