"""``torch.jit.trace`` and its ONNX exporter, as in Detectron2's tests of its export."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.structures import Boxes
from torch import Tensor

from retina_plugin.errors import ConfigError

# The traced size is none of them. Smaller and larger ones, with one and more locations on P7.
SIZES = [(64, 96), (33, 47), (150, 70), (10, 10), (260, 300)]

MODELS = {
    "drop": [],
    "keep": ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "keep"],
    "clip": ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "clip"],
    "torchvision's anchors": ["MODEL.ANCHOR_GENERATOR.NAME", "TorchvisionAnchorGenerator"],
    "class_agnostic": ["TEST.MERGE", "class_agnostic"],
    "no detection": ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.999"],
}


def detect(model, image):
    return model([{"image": image}])[0]["instances"]


def adapter(model, noise):
    return TracingAdapter(model, noise(1, 80, 120)[0], detect).eval()


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODELS)
def test_trace_equals_the_model_at_other_sizes(detector, noise, name):
    """Detectron2's ``TestTracing.testRetinaNet``, at five sizes."""
    _, model = detector(*MODELS[name])
    wrapper = adapter(model, noise)
    traced = torch.jit.trace(wrapper, (noise(1, 72, 110)[0],))
    number = 0
    for size in SIZES:
        (image,) = noise(1, *size)
        expected = detect(model, image)
        found = wrapper.outputs_schema(traced(image))
        number += len(expected)
        assert tuple(found.image_size) == size
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.pred_classes, expected.pred_classes)
        # the last bit of a sigmoid depends on its place in the tensor
        torch.testing.assert_close(found.scores, expected.scores, rtol=3e-7, atol=0)
    assert (number == 0) == (name == "no detection")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_of_a_batch_drops_what_lies_in_its_padding(detector, noise):
    """At sizes that were not traced, and where the other image is the larger one."""
    _, model = detector()

    def detect_two(model, first, second):
        return [x["instances"] for x in model([{"image": first}, {"image": second}])]

    wrapper = TracingAdapter(model, (noise(1, 64, 60)[0], noise(1, 150, 90)[0]), detect_two).eval()
    traced = torch.jit.trace(wrapper, wrapper.flattened_inputs)
    images = noise(1, 160, 170)[0], noise(1, 40, 33, seed=1)[0]
    found = wrapper.outputs_schema(traced(*images))
    for one, expected in zip(found, detect_two(model, *images), strict=True):
        assert len(expected) > 10 and torch.equal(one.pred_classes, expected.pred_classes)
        assert torch.equal(one.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.filterwarnings("ignore")  # the exporter and the tracer are old
@pytest.mark.parametrize("name", ["drop", "keep", "clip"])
def test_onnx_by_torchscript_equals_the_model_at_other_sizes(detector, noise, name):
    """Detectron2's ``export_onnx`` way; `retina export` has the newer one."""
    _, model = detector(*MODELS[name])
    file = io.BytesIO()
    torch.onnx.export(
        adapter(model, noise),
        (noise(1, 72, 110)[0],),
        file,
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in SIZES:
        (image,) = noise(1, *size)
        expected = detect(model, image)
        boxes, classes, scores, image_size = session.run(None, {"image": image.numpy()})
        assert tuple(image_size) == size
        assert (classes == expected.pred_classes.numpy()).all()
        np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=3e-4)
        np.testing.assert_allclose(scores, expected.scores, atol=5e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("merge", ["soft_nms", "wbf"])
def test_merges_outside_torch_are_not_traced(detector, noise, merge):
    """Their result would be the traced image's for every image."""
    _, model = detector("TEST.MERGE", merge)
    with pytest.raises(ConfigError, match="cannot be traced: trace with TEST.MERGE nms or "):
        torch.jit.trace(adapter(model, noise), (noise(1, 72, 110)[0],))


@pytest.mark.parametrize("script", [torch.jit.script, scripting_with_instances])
def test_scripting_is_refused_in_one_line(detector, script):
    _, model = detector()
    fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
    args = [fields] if script is scripting_with_instances else []
    with pytest.raises(ConfigError, match=r"^FocalRetinaNet cannot be .* `retina export`") as error:
        script(model, *args)
    assert "\n" not in str(error.value)
