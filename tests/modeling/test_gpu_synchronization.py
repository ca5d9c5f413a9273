"""A training step that does not synchronise with the GPU, tested on a machine without one.

Under PyTorch's FakeTensorMode tensors have a shape and a device, but no numbers. Whatever needs a
number on the host (``item``, ``nonzero``, boolean indexing) raises an error: on a GPU it would
synchronise. Copies between devices raise none, so they are watched.
"""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, ImageList, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicShape
from torch.utils._python_dispatch import TorchDispatchMode

from retina_plugin import add_retina_config
from retina_plugin.losses import dense
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher
from retina_plugin.modeling.anchors import AnchorGenerator
from retina_plugin.modeling.transfer import to_device

SYNCHRONISES = (DataDependentOutputException, DynamicShape)


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins for what needs a GPU or numbers: the kernel, pinned memory and padding."""

    def kernel_sums(x, *_):
        return x.new_empty(len(x), 2, dtype=torch.float64)

    # the Triton kernel
    kernel = SimpleNamespace(dense_sums=kernel_sums)
    monkeypatch.setattr(dense, "choose_backend", lambda *_: kernel)
    # pinning memory needs the CUDA driver
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    # padding: Detectron2 computes the size of the batch with tensors on the host
    monkeypatch.setattr(
        ImageList,
        "from_tensors",
        lambda images, *_, **__: ImageList(
            torch.stack(images), [tuple(x.shape[-2:]) for x in images]
        ),
    )


@pytest.fixture
def step(tiny_cfg, stand_ins):
    """step(keys): the losses of a training step with two images on a GPU."""

    def run(keys=(), meta_architecture="FocalRetinaNet"):
        cfg = add_retina_config(tiny_cfg.clone())
        cfg.MODEL.META_ARCHITECTURE = meta_architecture
        cfg.merge_from_list(list(keys))
        model = build_model(cfg).train()
        batch = [record(3, crowds=[1]), record(0, crowds=[])]
        # gt_iscrowd stays a real tensor
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, x in tensors.items():
                        if x is not None:
                            fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                            tensors[name] = fake.requires_grad_(x.requires_grad)
            for x in batch:
                x["image"] = torch.empty(3, 64, 64)
                x["instances"].gt_boxes = Boxes(torch.empty(len(x["instances"]), 4))
                x["instances"].gt_classes = torch.empty(len(x["instances"]), dtype=torch.int64)
            with EventStorage(), Copies() as copies:
                losses = model(batch)
            # each image, its boxes and its classes
            assert len(copies.blocking) >= 6 and not any(copies.blocking)
            return losses

    return run


class Copies(TorchDispatchMode):
    """Notes for each copy from one device to another whether the host waits for it."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in ("copy_", "_to_copy") and source.device != out.device:
            self.blocking.append(not (kwargs or {}).get("non_blocking", args[2:3] == (True,)))
        return out


def record(count, crowds):
    """A training record with ``gt_iscrowd`` alone: the host reads its numbers."""
    is_crowd = torch.zeros(count, dtype=torch.bool)
    is_crowd[crowds] = True
    return {"instances": Instances((64, 64), gt_iscrowd=is_crowd)}


@pytest.mark.parametrize(
    "keys",
    [
        ["NORMALIZER", "per_image"],
        ["NORMALIZER", "per_gpu"],
        ["NORMALIZER", "global"],
        ["NORMALIZER", "ema"],
        ["LOW_QUALITY_MATCHES", "never"],
        ["IGNORE_IOF_THRESH", 0.5],
        ["BBOX_REG_LOSS_TYPE", "l1", "ALPHA_PER_CLASS", [0.25] * 10],
    ],
    ids=str,
)
def test_training_step_does_not_synchronise(step, keys):
    keys = [k if i % 2 else f"MODEL.RETINANET.{k}" for i, k in enumerate(keys)]
    losses = step(keys)
    assert {name: x.device.type for name, x in losses.items()} == {
        "loss_cls": "cuda",
        "loss_box_reg": "cuda",
    }


@pytest.mark.parametrize(
    "keys",
    [["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"], ["MODEL.RETINANET.SAMPLER", "OHEM"]],
    ids=str,
)
def test_iou_losses_and_ohem_synchronise(step, keys):
    with pytest.raises(SYNCHRONISES):
        step(keys)


def test_detectron2s_training_step_synchronises(step):
    with pytest.raises(SYNCHRONISES):
        step(meta_architecture="RetinaNet")


@pytest.mark.parametrize("low_quality", ["always", "above_background", "never"])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_matcher_does_not_synchronise(low_quality, count):
    matcher = AnchorMatcher((0.4, 0.5), (0, -1, 1), low_quality)
    with FakeTensorMode():
        boxes, anchors = (torch.empty(n, 4, device="cuda") for n in (count, 50_000))
        assert matcher(boxes, anchors).label.shape == (50_000,)


def test_crowds_that_are_on_the_gpu_synchronise(stand_ins):
    """What ``to_device`` avoids: it leaves ``gt_iscrowd`` on the host."""
    labeler = AnchorLabeler(AnchorMatcher((0.4, 0.5), (0, -1, 1)), 10)
    with FakeTensorMode():
        instances = Instances((64, 64), gt_boxes=Boxes(torch.empty(3, 4, device="cuda")))
        instances.gt_classes = torch.empty(3, dtype=torch.int64, device="cuda")
        instances.gt_iscrowd = torch.empty(3, dtype=torch.bool, device="cuda")
        with pytest.raises(RuntimeError):
            labeler(torch.empty(50, 4, device="cuda"), [instances])


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5])
def test_anchors_are_detectron2s(offset):
    settings = {"sizes": [[32, 40.3], [64]], "aspect_ratios": [[0.5, 1, 2]], "strides": [8, 16]}
    features = [torch.zeros(1, 1, 7, 11), torch.zeros(1, 1, 4, 1)]
    expected = DefaultAnchorGenerator(offset=offset, **settings)(features)
    got = AnchorGenerator(offset=offset, **settings)(features)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(got, expected, strict=True))


def test_to_device_keeps_types_and_leaves_its_input():
    fields = {
        "gt_boxes": Boxes(torch.ones(2, 4)),
        "gt_classes": torch.ones(2),
        "gt_iscrowd": torch.ones(2, dtype=torch.bool),
        "rotated": RotatedBoxes(torch.ones(2, 5)),
        "names": ["a", "b"],
    }
    moved, tensor = to_device([Instances((8, 9), **fields), torch.zeros(3)], torch.device("meta"))
    assert tensor.is_meta and moved.gt_boxes.tensor.is_meta and moved.gt_classes.is_meta
    assert isinstance(moved.rotated, RotatedBoxes) and moved.rotated.tensor.is_meta
    assert moved.image_size == (8, 9) and len(moved) == 2 and moved.names == ["a", "b"]
    assert moved.gt_iscrowd.device.type == "cpu"  # the labeler reads it on the host
    assert fields["gt_classes"].device.type == "cpu"


def test_copies_to_a_gpu_come_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with FakeTensorMode(), Copies() as copies:
        instances = Instances((8, 9), gt_boxes=Boxes(torch.ones(2, 4)), gt_classes=torch.ones(2))
        to_device([instances, torch.zeros(3)], torch.device("cuda"))
    assert len(pinned) == 3 and copies.blocking == [False] * 3
