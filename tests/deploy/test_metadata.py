"""What a file says of itself."""

import dataclasses
import json

import pytest
import torch

from retina_plugin.deploy.metadata import Metadata, config_digest, weights_digest
from retina_plugin.errors import ConfigError


def test_json_and_back(detector, metadata_of):
    metadata = metadata_of(*detector())
    assert Metadata.from_json(metadata.to_json()) == metadata
    assert metadata.format == "BGR" and (metadata.min_size, metadata.max_size) == (64, 96)
    numbered = dataclasses.replace(metadata, category_ids=(3, 4))
    assert Metadata.from_json(numbered.to_json()).category_ids == (3, 4)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "null"])
def test_damaged_metadata_is_one_line(text):
    with pytest.raises(ConfigError, match=r"^a.onnx: its metadata cannot be read: "):
        Metadata.from_json(text, "a.onnx")


def test_later_version_is_refused(detector, metadata_of):
    content = json.loads(metadata_of(*detector()).to_json()) | {"version": 2}
    with pytest.raises(ConfigError, match=r"a later version .*version 2, this one reads 1"):
        Metadata.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("mapper", "resampler"),
    [
        ("FastMapper", "torch"),
        ("DatasetMapper", "pillow"),
        ("TrainingMapper", "torch"),
        ("GreyMapper", "custom"),
        ("RecordMapper", "custom"),
    ],
)
@pytest.mark.usefixtures("user_mappers")
def test_mapper_that_prepares_images_in_its_own_way_is_told(
    detector, metadata_of, mapper, resampler
):
    cfg, model = detector("INPUT.MAPPER", mapper)
    assert metadata_of(cfg, model).resampler == resampler


def test_config_digest_tells_what_changes_detections(detector):
    """And not where or how fast they are computed."""
    digest = config_digest(detector()[0])
    same = ["MODEL.WEIGHTS", "a.pth", "MODEL.CHANNELS_LAST", "True", "SOLVER.BASE_LR", "1.0"]
    assert config_digest(detector(*same, "OUTPUT_DIR", "elsewhere")[0]) == digest
    for other in (
        ["MODEL.RETINANET.NMS_THRESH_TEST", "0.6"],
        ["INPUT.MIN_SIZE_TEST", "65"],
        ["TEST.DETECTIONS_PER_IMAGE", "99"],
        ["MODEL.PIXEL_STD", "[1.0, 1.0, 2.0]"],
    ):
        assert config_digest(detector(*other)[0]) != digest


def test_weights_digest_tells_names_types_and_values():
    state = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.int64)}
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    assert weights_digest({"a": state["a"].view(2, 2), "b": state["b"]}) != digest
    assert weights_digest({"a": state["a"].double(), "b": state["b"]}) != digest
    assert weights_digest({"c": state["a"], "b": state["b"]}) != digest
    assert weights_digest({"a": state["a"] + 1e-7, "b": state["b"]}) != digest
