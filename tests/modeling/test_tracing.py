"""Detectron2's own ways to export: RetinaNet's tests of its tests/test_export_*.py, for ours.

There the trace is compared at one other size; here at larger and smaller ones, with every option
that changes how detections are found.
"""

import io
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.structures import Boxes

import retina_plugin
from retina_plugin.data.views import build_resizes
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import RetinaNetWithTTA

# The trace is made at 96 x 128. Some levels have more and some fewer candidates than the top k.
TRACED, SIZES = (96, 128), [(96, 128), (160, 96), (64, 200), (33, 47), (10, 10)]
TOP_K = ["MODEL.RETINANET.TOPK_CANDIDATES_TEST", "60"]


def detect(model, image):
    return model([{"image": image}])[0]["instances"]


def adapter(model, *images, inference=detect):
    return TracingAdapter(model, images, inference).eval()


def trace(wrapper, *images):
    """The traced module. A value that became a constant is a TracerWarning from our code."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(wrapper, images)
    ours = Path(retina_plugin.__file__).parent
    assert not [str(x) for x in caught if ours in Path(x.filename).parents]
    return traced


def assert_equal(got, expected):
    """To the bit: number, order and image size too."""
    assert got.image_size.tolist() == list(expected.image_size)
    assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(got.pred_classes, expected.pred_classes)


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "keep"],
        ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "drop", "MODEL.CHANNELS_LAST", "True"],
        ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "clip", "TEST.MERGE", "class_agnostic"],
        ["MODEL.ANCHOR_GENERATOR.NAME", "TorchvisionAnchorGenerator"],
        ["MODEL.ANCHOR_GENERATOR.NAME", "DetectronAnchorGenerator"],
    ],
    ids=["keep", "drop", "clip", "torchvision", "detectron"],
)
def test_trace_detects_the_same_at_other_sizes(detector, noise, options):
    """Larger, smaller, wider, and so small that a level has one location."""
    _, model = detector(*TOP_K, *options)
    (image,) = noise(1, *TRACED)
    wrapper = adapter(model, image)
    traced = trace(wrapper, image)
    for seed, size in enumerate(SIZES):
        (image,) = noise(1, *size, seed=seed)
        with torch.no_grad():
            expected, got = detect(model, image), wrapper.outputs_schema(traced(image))
        assert len(expected) > 0
        assert_equal(got, expected)


def test_trace_of_8_bit_pixels_takes_others(detector, noise):
    """As Detectron2's does: the traced image's dtype is no part of the trace."""
    _, model = detector(*TOP_K)
    (image,) = noise(1, *TRACED)
    wrapper = adapter(model, image.byte())
    traced = trace(wrapper, image.byte())
    with torch.no_grad():
        assert_equal(wrapper.outputs_schema(traced(image + 0.4)), detect(model, image + 0.4))


def test_trace_of_an_image_without_detections(detector, noise):
    """A trace made where nothing is found detects elsewhere, and the reverse."""
    _, model = detector(*TOP_K, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.5")
    (image,) = noise(1, *TRACED)
    flat = torch.full_like(image, 114.0)
    with torch.no_grad():
        assert len(detect(model, image)) > len(detect(model, flat)) == 0
    for traced_image, other in ((flat, image), (image, flat)):
        wrapper = adapter(model, traced_image)
        traced = trace(wrapper, traced_image)
        with torch.no_grad():
            assert_equal(wrapper.outputs_schema(traced(other)), detect(model, other))


def test_trace_of_two_images_of_different_sizes(detector, noise):
    """They are padded to one size, which the trace computes."""

    def both(model, first, second):
        return [x["instances"] for x in model([{"image": first}, {"image": second}])]

    _, model = detector(*TOP_K)
    images = (noise(1, *TRACED)[0], noise(1, 64, 72)[0])
    wrapper = adapter(model, *images, inference=both)
    traced = trace(wrapper, *images)
    for sizes in ((64, 40), (160, 96)), ((100, 200), (33, 47)):
        images = [noise(1, *size, seed=7)[0] for size in sizes]
        with torch.no_grad():
            for got, expected in zip(
                wrapper.outputs_schema(traced(*images)), both(model, *images), strict=True
            ):
                assert_equal(got, expected)


@pytest.mark.filterwarnings("ignore")  # deprecated, and every branch on a shape in Detectron2
def test_torchscript_onnx_exporter(detector, noise):
    """Detectron2's opset, 14, run by onnxruntime at other sizes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    _, model = detector(*TOP_K, "MODEL.RETINANET.BOXES_OUTSIDE_TEST", "drop")
    (image,) = noise(1, *TRACED)
    wrapper = adapter(model, image)
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            wrapper,
            wrapper.flattened_inputs,
            file,
            dynamo=False,
            opset_version=14,
            input_names=["image"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for seed, size in enumerate(SIZES):
        (image,) = noise(1, *size, seed=seed)
        with torch.no_grad():
            expected = detect(model, image)
        got = wrapper.outputs_schema(
            [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]
        )
        assert len(got) == len(expected) > 0
        assert torch.equal(got.pred_classes, expected.pred_classes)
        torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-5)
        boxes = got.pred_boxes.tensor, expected.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)


def test_scripting_is_refused_in_one_line(detector):
    """It names what to do instead. Nothing stays changed: the model detects and traces."""
    _, model = detector()
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    with pytest.raises(ConfigError, match=r"^FocalRetinaNet cannot be scripted .*`retina export`"):
        scripting_with_instances(model, fields)
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(ConfigError, match="cannot be scripted"):
        torch.jit.script(wrapped)


@pytest.mark.parametrize("merge", ["soft_nms", "wbf"])
def test_a_merge_in_numpy_is_not_traced(detector, noise, merge):
    """Its result would be a constant: the trace would give the traced image's detections."""
    _, model = detector("TEST.MERGE", merge)
    (image,) = noise(1, *TRACED)
    with pytest.raises(ConfigError, match="cannot be traced: set TEST.MERGE nms"):
        torch.jit.trace(adapter(model, image), (image,), check_trace=False)


def test_views_are_not_traced(detector, noise):
    """They are resized by Pillow."""
    cfg, model = detector("TEST.AUG.MIN_SIZES", "(64,)")
    views = RetinaNetWithTTA.build(cfg, model, build_resizes(cfg)).eval()
    (image,) = noise(1, *TRACED)
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED False"):
        torch.jit.trace(adapter(views, image), (image,), check_trace=False)
