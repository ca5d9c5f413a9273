"""A small ONNX file with the parts of an exported detector: pixels, network, boxes."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from retina_plugin.deploy.metadata import METADATA_KEY


def write_small(path, metadata):
    """boxes = conv3(x + up(conv2(pool(x)))) squared, with x = relu(conv1(image - 100.3))."""
    generator = np.random.default_rng(0)

    def conv(name, outputs, inputs):
        weights[f"{name}.w"] = generator.normal(0, 0.2, (outputs, inputs, 3, 3)).astype("f4")
        weights[f"{name}.b"] = generator.normal(0, 0.2, outputs).astype("f4")
        return [f"{name}.w", f"{name}.b"]

    weights = {
        "mean": np.float32(100.3),
        "scales": np.array([1, 1, 2, 2], "f4"),
    }
    same = {"pads": [1, 1, 1, 1]}
    node = helper.make_node
    nodes = [
        node("Sub", ["image", "mean"], ["centered"], "sub"),
        node("Conv", ["centered", *conv("c1", 8, 3)], ["y1"], "conv1", **same),
        node("Relu", ["y1"], ["x"], "relu"),
        node("MaxPool", ["x"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["pooled", *conv("c2", 8, 8)], ["y2"], "conv2", **same),
        node("Resize", ["y2", "", "scales"], ["up"], "resize", mode="nearest"),
        node("Add", ["x", "up"], ["sum"], "add"),
        node("Conv", ["sum", *conv("c3", 4, 8)], ["deltas"], "conv3", **same),
        node("Mul", ["deltas", "deltas"], ["boxes"], "mul"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 4, "H", "W"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, metadata.to_json()
    onnx.save(model, path)
    return path
