"""Losses of a training step that wait for no accelerator, seen on a machine that has none.

Under PyTorch's FakeTensorMode tensors of any device have shapes but no numbers, and what would have
to wait for a number (``item``, ``nonzero``, a selection by a mask) is an error. A copy between the
devices is none; these are watched for.
"""

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
from retina_plugin.modeling.anchors import AnchorGenerator, to_device

WAITS = (DataDependentOutputException, DynamicShape)


@pytest.fixture
def step(tiny_cfg, monkeypatch):
    """step(keys): the losses of a training step of two images on a GPU that is not there."""

    def run(keys=(), meta_architecture="FocalRetinaNet"):
        cfg = add_retina_config(tiny_cfg.clone())
        cfg.MODEL.META_ARCHITECTURE = meta_architecture
        cfg.merge_from_list(list(keys))
        model = build_model(cfg).train()
        # what Triton computes, which knows no tensors without numbers
        monkeypatch.setattr(
            dense, "_level_sums", lambda x, *_: x.new_empty(len(x), 2, dtype=torch.float64)
        )
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # there is no driver to ask
        with FakeTensorMode():
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, x in tensors.items():
                        if x is not None:
                            fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                            tensors[name] = fake.requires_grad_(x.requires_grad)
            # it pads images by sizes that are numbers of the host, which have none here either
            images = ImageList(torch.empty(2, 3, 64, 64, device="cuda"), [(64, 64)] * 2)
            monkeypatch.setattr(model, "preprocess_image", lambda _: images)
            with EventStorage(), Copies() as copies:
                losses = model([record(3), record(0)])
            assert len(copies.waits) >= 6 and not any(copies.waits)  # two images, boxes, classes
            return losses

    return run


class Copies(TorchDispatchMode):
    """Notes each copy from one device to another, and whether it waits."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in ("copy_", "_to_copy") and source.device != out.device:
            self.waits.append(not (kwargs or {}).get("non_blocking", args[2:3] == (True,)))
        return out


def record(count):
    instances = Instances((64, 64), gt_boxes=Boxes(torch.empty(count, 4)))
    instances.gt_classes = torch.empty(count, dtype=torch.int64)
    return {"image": torch.empty(3, 64, 64), "instances": instances}


@pytest.mark.parametrize(
    "keys",
    [
        ["NORMALIZER", "per_image"],
        ["NORMALIZER", "per_gpu"],
        ["NORMALIZER", "global"],
        ["NORMALIZER", "ema"],
        ["BBOX_REG_LOSS_TYPE", "l1", "ALPHA_PER_CLASS", [0.25] * 10],
    ],
    ids=str,
)
def test_the_losses_wait_for_nothing(step, keys):
    keys = [k if i % 2 else f"MODEL.RETINANET.{k}" for i, k in enumerate(keys)]
    losses = step(keys)
    assert {name: x.device.type for name, x in losses.items()} == {
        "loss_cls": "cuda",
        "loss_box_reg": "cuda",
    }


def test_what_does_wait(step):
    """Detectron2's step, and ours where torchvision's losses or a minibatch have to be indexed."""
    for keys in (
        ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"],
        ["MODEL.RETINANET.SAMPLER", "OHEM"],
    ):
        with pytest.raises(WAITS):
            step(keys)
    with pytest.raises(WAITS):
        step(meta_architecture="RetinaNet")


def test_labels_with_crowds_wait_for_nothing():
    labeler = AnchorLabeler(AnchorMatcher((0.4, 0.5), (0, -1, 1)), 10, ignore_iof_thresh=0.5)
    with FakeTensorMode():
        boxes = [torch.empty(n, 4, device="cuda") for n in (3, 0)]
        classes = [torch.empty(len(b), dtype=torch.int64, device="cuda") for b in boxes]
        targets = labeler(torch.empty(50, 4, device="cuda"), boxes, classes, boxes)
        assert targets.label_NR.shape == (2, 50)


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5])
def test_anchors_are_detectron2s(offset):
    settings = {"sizes": [[32, 40.3], [64]], "aspect_ratios": [[0.5, 1, 2]], "strides": [8, 16]}
    features = [torch.zeros(1, 1, 7, 11), torch.zeros(1, 1, 4, 1)]
    expected = DefaultAnchorGenerator(offset=offset, **settings)(features)
    got = AnchorGenerator(offset=offset, **settings)(features)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(got, expected, strict=True))


def test_what_moves_stays_what_it_is():
    fields = {
        "gt_boxes": Boxes(torch.ones(2, 4)),
        "gt_classes": torch.ones(2),
        "rotated": RotatedBoxes(torch.ones(2, 5)),
        "names": ["a", "b"],
    }
    moved, tensor = to_device([Instances((8, 9), **fields), torch.zeros(3)], torch.device("meta"))
    assert tensor.is_meta and moved.gt_boxes.tensor.is_meta and moved.gt_classes.is_meta
    assert isinstance(moved.rotated, RotatedBoxes) and moved.rotated.tensor.is_meta
    assert moved.image_size == (8, 9) and len(moved) == 2 and moved.names == ["a", "b"]
    assert fields["gt_classes"].device.type == "cpu"


def test_to_a_gpu_copies_are_queued_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with FakeTensorMode(), Copies() as copies:
        instances = Instances((8, 9), gt_boxes=Boxes(torch.ones(2, 4)), gt_classes=torch.ones(2))
        to_device([instances, torch.zeros(3)], torch.device("cuda"))
    assert len(pinned) == 3 and copies.waits == [False] * 3
