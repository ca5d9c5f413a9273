"""An ONNX network in 16 bit."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["to_float16"]

# Operators that compute in 16 bit. Any other one of a backbone stays in float32, with a conversion
# before and after it.
_IN_16_BIT = (
    *("Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "Gemm"),
    *("GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu", "MatMul", "MaxPool", "Mul"),
    *("Relu", "Resize", "Sigmoid"),
)


def to_float16(graph: Any, network: set[str]) -> None:
    """Compute the nodes of the network in float16, with casts at its borders only.

    The converter of onnxruntime.transformers also casts between the nodes that it leaves in
    float32, so that boxes would pass through 16 bits.
    """
    import onnx

    FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    types = {x.name: x.type.tensor_type.elem_type for x in (*graph.input, *graph.value_info)}
    weights = {x.name: x for x in graph.initializer}
    types.update({name: x.data_type for name, x in weights.items()})
    inside = [n for n in graph.node if n.name in network and n.op_type in _IN_16_BIT]
    half = {name for node in inside for name in node.output}
    names = {node.name for node in inside}
    nodes: list[Any] = []
    casts: set[str] = set()

    def cast(name: str, to: int) -> str:
        result = f"{name}_as_{'float16' if to == FLOAT16 else 'float32'}"
        if result not in casts:
            casts.add(result)
            if name in weights:
                values = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(values, result))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [result], f"{result}_", to=to))
        return result

    for node in graph.node:
        if node.name in names:
            # Of Resize the first input alone may have 16 bits: the others are sizes.
            count = 1 if node.op_type == "Resize" else len(node.input)
            for i, name in enumerate(node.input[:count]):
                if name not in half and types.get(name) == FLOAT:
                    node.input[i] = cast(name, FLOAT16)
        else:
            for i, name in enumerate(node.input):
                if name in half:
                    node.input[i] = cast(name, FLOAT)
        nodes.append(node)
    for value in graph.output:  # of the stage head: logits and deltas
        if value.name in half:
            for node in nodes:
                for names_of in (node.input, node.output):
                    for i, name in enumerate(names_of):
                        if name == value.name:
                            names_of[i] = f"{name}_in_16_bit"
            nodes.append(
                onnx.helper.make_node(
                    "Cast", [f"{value.name}_in_16_bit"], [value.name], f"{value.name}_", to=FLOAT
                )
            )
    ordered = list(map(_copied, nodes))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(ordered)
    used = {name for node in graph.node for name in node.input}
    kept = [_copied(x) for x in graph.initializer if x.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _copied(message: Any) -> Any:
    """A copy, because protobuf deletes the members of a list that is emptied."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
