"""An ONNX file that is written in a moment, with the inputs, outputs and metadata of an export.

It "detects" the three channels of the image that it gets: their scores are the channels' means.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from retina_plugin.deploy.metadata import METADATA_KEY, Metadata

__all__ = ["NAMES", "metadata", "write_echo"]

NAMES = ("кошка", "dog", "bird")

# In an input of 100 x 50 pixels: inside, over the right and lower edge, without height.
BOXES = [[10, 10, 30, 40], [60, 20, 130, 70], [10, 20, 30, 20]]


def metadata(**changes) -> Metadata:
    values = {
        "stage": "nms",
        "format": "RGB",
        "min_size": 50,
        "max_size": 1000,
        "resize": "detectron2",
        "resampler": "torch",
        "boxes_outside": "drop",
        "class_names": NAMES,
        "category_ids": (7, 8, 9),
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "topk_candidates": 1000,
        "max_detections": 3,
        "divisibility": 32,
        "config_digest": "",
        "weights_digest": "",
    }
    return Metadata(**{**values, **changes})


def write_echo(path: Path, record: str | None = None, **changes) -> Path:
    """Write the file.

    Args:
        record: the text of the metadata; None: that of ``metadata(**changes)``; "": none at all.
    """
    constants = {
        "boxes_14": np.array([BOXES], np.float32),
        "classes_13": np.array([[0, 1, 2]], np.int64),
        "most": np.float32(255),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "most"], ["scores"]),
        helper.make_node("Identity", ["boxes_14"], ["boxes"]),
        helper.make_node("Identity", ["classes_13"], ["classes"]),
    ]
    shapes = {"boxes": (TensorProto.FLOAT, [1, 3, 4]), "scores": (TensorProto.FLOAT, ["N", 3])}
    shapes["classes"] = (TensorProto.INT64, [1, 3])
    graph = helper.make_graph(
        nodes,
        "echo",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    text = metadata(**changes).to_json() if record is None else record
    if text:
        helper.set_model_props(model, {"other": "entry", METADATA_KEY: text})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
