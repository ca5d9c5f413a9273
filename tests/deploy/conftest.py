"""Exported files of the fixture ``detector``, written once."""

import pytest

from retina_plugin.deploy import DenseModel, describe_model, write_exported

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
