"""A training step that never waits for an accelerator, seen on a machine that has none.

Under PyTorch's FakeTensorMode tensors of any device have shapes but no numbers, and what would have
to wait for a number (``item``, ``nonzero``, a selection by a mask) is an error.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicShape

from retina_plugin import add_retina_config
from retina_plugin.losses import dense
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher
from retina_plugin.modeling.nonblocking import to_device

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
            with EventStorage():
                return model([record(3), record(0)])

    return run


def record(count):
    classes = torch.empty(count, dtype=torch.int64, device="cuda")
    boxes = Boxes(torch.empty(count, 4, device="cuda"))
    return {"image": None, "instances": Instances((64, 64), gt_boxes=boxes, gt_classes=classes)}


@pytest.mark.parametrize("normalizer", ["per_image", "per_gpu", "global", "ema"])
def test_a_training_step_waits_for_nothing(step, normalizer):
    losses = step(["MODEL.RETINANET.NORMALIZER", normalizer])
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


def test_a_batch_moves_and_stays_what_it_is():
    instances = Instances((8, 9), gt_boxes=Boxes(torch.ones(2, 4)), gt_classes=torch.ones(2))
    batch = [{"image": torch.zeros(3, 8, 9), "instances": instances, "height": 8, "file_name": "a"}]
    (moved,) = to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta and batch[0]["image"].device.type == "cpu"
    assert moved["instances"].gt_boxes.tensor.is_meta and moved["instances"].gt_classes.is_meta
    assert moved["instances"].image_size == (8, 9) and len(moved["instances"]) == 2
    assert (moved["height"], moved["file_name"]) == (8, "a")
    assert to_device([None], torch.device("meta")) == [None]
