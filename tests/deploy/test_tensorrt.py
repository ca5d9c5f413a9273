"""The ONNX files keep to the operators that docs/deployment.md names for TensorRT."""

import runpy

import pytest


def operators(graph):
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from operators(attribute.g)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["nms", "boxes"])
def test_operators_are_those_that_tensorrt_lists(exported, repo, stage):
    """No custom operator and no function of another domain remains."""
    onnx = pytest.importorskip("onnx")
    path, _, _ = exported(".onnx", stage)
    model = onnx.load(path)
    listed = runpy.run_path(str(repo / "docs" / "make_deployment.py"))["TENSORRT_OPERATORS"]
    used = set(operators(model.graph))
    assert used <= set(listed)
    assert {opset.domain for opset in model.opset_import} == {""} and not model.functions
    left_out = {"TopK", "NonMaxSuppression", "ScatterND"}  # of "boxes", as the page says
    assert used & left_out == (left_out if stage == "nms" else set())
