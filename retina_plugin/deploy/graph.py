"""Which part of an exported file is the network, and which is the arithmetic around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["network", "onnx_network", "outside_network"]


def onnx_network(graph: Any) -> set[str]:
    """The nodes of an ONNX graph that are in the network."""
    producer = {output: node.name for node in graph.node for output in node.output}
    inputs = {
        node.name: [producer[name] for name in node.input if name in producer]
        for node in graph.node
    }
    return network(inputs, {node.name for node in graph.node if node.op_type == "Conv"})


def outside_network(model: Any) -> list[str]:
    """The operators of an OpenVINO model that are not in the network."""
    inputs: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        inputs[name] = [x.get_source_output().get_node().get_friendly_name() for x in node.inputs()]
        kinds[name] = node.get_type_name()
    inside = network(inputs, {name for name, kind in kinds.items() if "Convolution" in kind})
    return [
        name
        for name, kind in kinds.items()
        if name not in inside and kind not in ("Constant", "Parameter", "Result")
    ]


def network(inputs: Mapping[str, Sequence[str]], convolutions: set[str]) -> set[str]:
    """The nodes on the way from one convolution to another, and all convolutions but the last ones.

    The last ones give logits and deltas. Their outputs decide the order of all detections and the
    boxes to a part of a pixel: in 8 bit they cost more AP than all others together.

    Args:
        inputs: for each node those that its inputs come from.
        convolutions: the nodes that are one.
    """
    outputs: dict[str, list[str]] = {name: [] for name in inputs}
    for name, sources in inputs.items():
        for source in sources:
            outputs[source].append(name)
    before = _reachable(inputs, {source for name in convolutions for source in inputs[name]})
    return before & _reachable(outputs, convolutions)


def _reachable(edges: Mapping[str, Sequence[str]], start: set[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += edges[name]
    return found
