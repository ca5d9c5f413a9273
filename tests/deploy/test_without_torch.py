"""An exported model without PyTorch, in Python and in a browser, against the predictor."""

import dataclasses
import functools
import http.server
import json
import shutil
import threading

import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from sklearn.datasets import load_sample_images

from retina_plugin.deploy import load_exported, write_exported
from retina_plugin.deploy.dense import DenseModel
from retina_plugin.deploy.metadata import METADATA_KEY, describe_model
from retina_plugin.deploy.page import fetch_onnxruntime_web, write_page
from retina_plugin.deploy.standalone import Detector
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.predict import RetinaPredictor
from tests.deploy.browser import Browser, find_browser
from tests.deploy.echo import write_echo

pytestmark = pytest.mark.slow

SCORE, BOX = 5e-6, 3e-4  # the largest differences, boxes in pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "<b>nine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def cfg(repo):
    cfg = setup_cfg(str(repo / "configs" / "_base_" / "digits_R18.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = ""
    return cfg


@pytest.fixture(scope="module")
def weights(cfg, folder):
    """Random weights whose scores are spread, as those of a trained model are."""
    torch.manual_seed(0)
    model = build_model(cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    model.head.cls_score.bias.data.fill_(-2.0)
    path = folder / "weights.pth"
    torch.save({"model": model.state_dict(), "class_names": list(NAMES)}, path)
    return path


@pytest.fixture(scope="module")
def exported(cfg, weights, folder):
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    dense = DenseModel(model).eval()
    about = {"class_names": NAMES, "category_ids": None, "divisibility": dense.divisibility}
    path = folder / "digits.onnx"
    write_exported(
        dense, describe_model(cfg, model.state_dict(), stage="nms", **about), path
    )
    return path


@pytest.fixture(scope="module")
def photos(folder):
    """Photos and parts of them: odd sizes, a turned one, a transparent one, a tiny one."""
    china, flower = load_sample_images().images
    alpha = np.random.default_rng(0).integers(0, 256, flower.shape[:2], dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(china).save(folder / "china.png")
    Image.fromarray(china[:401, :333]).save(folder / "000000000139.png")
    Image.fromarray(np.dstack([flower, alpha])).save(folder / "transparent.png")
    Image.fromarray(flower[5:38, :47]).save(folder / "tiny.png")
    Image.fromarray(china[:, :501]).save(folder / "turned.jpg", exif=exif, quality=92)
    names = ("china.png", "000000000139.png", "transparent.png", "tiny.png", "turned.jpg")
    return [folder / name for name in names]


def changed(source, target, **changes):
    """A copy of a model with other metadata."""
    model = onnx.load(source)
    record = dataclasses.replace(load_exported(source).metadata, **changes)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = record.to_json()
    onnx.save(model, target)
    return target


def assert_equal(boxes, scores, classes, expected):
    """The same detections in the same order, but for the order of scores that are so close."""
    assert len(scores) == len(expected) > 0
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=SCORE)
    for box, score, k in zip(boxes, scores, classes):
        close = np.abs(expected.scores - score) <= SCORE
        close &= expected.class_ids == k
        assert (np.abs(expected.boxes[close] - box) <= BOX).all(axis=1).any(), (box, score, k)


@pytest.mark.parametrize(
    "opts, changes",
    [
        ([], {}),
        (["INPUT.MAPPER", "DatasetMapper"], {"resampler": "pillow"}),
        (["INPUT.RESIZE", "torchvision"], {"resize": "torchvision"}),
        (["INPUT.MIN_SIZE_TEST", "333"], {"min_size": 333}),
        (["INPUT.MIN_SIZE_TEST", "0"], {"min_size": 0}),
    ],
    ids=["torch", "pillow", "torchvision", "larger", "not resized"],
)
def test_standalone_finds_what_the_predictor_finds(opts, changes, cfg, weights, exported, photos, tmp_path):
    predictor = RetinaPredictor.load(cfg, weights, opts=opts)
    detect = Detector(changed(exported, tmp_path / "model.onnx", **changes), threads=1)
    for photo in photos:
        found = detect(photo)
        expected = predictor(photo)
        assert_equal(found.boxes, found.scores, found.class_ids, expected)
        assert found.class_names == [NAMES[k] for k in found.class_ids]
        assert found.image_size == expected.image_size
