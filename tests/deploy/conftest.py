"""Exported files of the fixture ``detector``, written once."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from retina_plugin.data import DATASET_MAPPER_REGISTRY, FastMapper
from retina_plugin.deploy import DenseModel, describe_model, write_exported
from retina_plugin.predict import RetinaPredictor

NAMES = [f"дзета {k}" for k in range(10)]


@pytest.fixture(scope="session")
def metadata_of():
    """metadata_of(cfg, model, stage) of a model of the fixture ``detector``."""

    def describe(cfg, model, stage="nms"):
        return describe_model(
            cfg,
            model.state_dict(),
            stage=stage,
            class_names=NAMES[: cfg.MODEL.RETINANET.NUM_CLASSES],
            category_ids=None,
            divisibility=32,
        )

    return describe


@pytest.fixture(scope="session")
def exported(detector, metadata_of, tmp_path_factory):
    """exported(".onnx"): the tiny detector as a file, written once; its config and model."""
    cfg, model = detector()
    folder = tmp_path_factory.mktemp("exported")

    def export(suffix, stage="nms"):
        path = folder / f"{stage}{suffix}"
        if not path.exists():
            write_exported(DenseModel(model, stage).eval(), metadata_of(cfg, model, stage), path)
        return path, cfg, model

    return export


@pytest.fixture(scope="session")
def exported_onnx(exported):
    """The tiny detector's .onnx, stage nms; its config and model."""
    return exported(".onnx")


class GreyMapper(FastMapper):
    """A user's, which prepares images in its own way."""

    def prepare_image(self, image):
        return super().prepare_image(image).float().mean(0, keepdim=True).expand(3, -1, -1)


class TrainingMapper(FastMapper):
    """A user's, which differs in training only."""


class RecordMapper:
    """A user's, which needs a record."""

    @classmethod
    def from_config(cls, cfg, is_train):
        return {}


@pytest.fixture
def user_mappers():
    """Registers the classes above, as a file of ``IMPORTS`` does."""
    mappers = (GreyMapper, TrainingMapper, RecordMapper)
    for mapper in mappers:
        DATASET_MAPPER_REGISTRY.register(mapper)
    yield
    for mapper in mappers:
        del DATASET_MAPPER_REGISTRY._obj_map[mapper.__name__]  # fvcore has no other way


@pytest.fixture(scope="session")
def predictor(exported_onnx, tmp_path_factory):
    """predictor(*overrides) of the config: the tiny detector behind the predictor's own path."""
    _, cfg, module = exported_onnx
    weights = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": module.state_dict(), "class_names": NAMES}, weights)
    return lambda *overrides: RetinaPredictor.load(cfg, weights, opts=list(map(str, overrides)))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Photos and parts of them: odd sizes, a turned one, a transparent one, a tiny one."""
    folder = tmp_path_factory.mktemp("photos")
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
