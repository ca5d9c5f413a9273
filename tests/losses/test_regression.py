"""Box losses against Detectron2's and fvcore's."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ciou_loss, diou_loss
from fvcore.nn import giou_loss, smooth_l1_loss

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses import BOX_LOSS_REGISTRY, BoxLoss
from retina_plugin.losses.regression import SmoothL1


def build(name, **retinanet):
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = name
    for key, value in retinanet.items():
        cfg.MODEL.RETINANET[key] = value
    return BOX_LOSS_REGISTRY.build(cfg)


def random_boxes(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 50
    return torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=generator) * 60], dim=1)


@pytest.mark.parametrize("beta", [0.0, 0.11, 1.0])
def test_smooth_l1_equals_fvcore(beta):
    loss = build("smooth_l1", SMOOTH_L1_LOSS_BETA=beta)
    prediction, target = torch.randn(30, 4), torch.randn(30, 4)
    assert loss.on == "deltas"
    expected = smooth_l1_loss(prediction, target, beta=beta, reduction="none").sum(dim=1)
    torch.testing.assert_close(loss(prediction, target), expected)


def test_l1_is_smooth_l1_with_beta_0():
    prediction, target = torch.randn(30, 4), torch.randn(30, 4)
    expected = build("smooth_l1", SMOOTH_L1_LOSS_BETA=0.0)(prediction, target)
    torch.testing.assert_close(build("l1")(prediction, target), expected)


@pytest.mark.parametrize(
    "name, peer", [("giou", giou_loss), ("diou", diou_loss), ("ciou", ciou_loss)]
)
def test_iou_losses_equal_detectron2(name, peer):
    loss = build(name)
    assert loss.on == "boxes"
    ours, theirs = (random_boxes(0).requires_grad_() for _ in range(2))
    value, expected = loss(ours, random_boxes(1)), peer(theirs, random_boxes(1), reduction="none")
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["smooth_l1", "l1", "giou", "diou", "ciou"])
def test_perfect_boxes_have_no_loss(name):
    loss = build(name)
    boxes = random_boxes(2)
    torch.testing.assert_close(loss(boxes, boxes), torch.zeros(len(boxes)), rtol=0, atol=1e-5)
    assert loss(boxes[:0], boxes[:0]).shape == (0,)


def test_a_loss_can_be_chosen_by_the_name_of_its_class():
    assert type(build("GIoU")) is type(build("giou"))


def test_unknown_name_raises_and_lists_the_known_ones():
    with pytest.raises(ConfigError, match="BBOX_REG_LOSS_TYPE.*'iou'.*smooth_l1.*SmoothL1"):
        build("iou")


def test_user_box_loss_needs_only_a_call():
    class Half(BoxLoss):
        def __call__(self, prediction_P4, target_P4):
            return (prediction_P4 - target_P4).abs().sum(dim=1) / 2

    BOX_LOSS_REGISTRY.register(Half)
    try:
        loss = build("Half")
    finally:
        del BOX_LOSS_REGISTRY._obj_map["Half"]  # fvcore has no other way
    assert loss.on == "deltas" and loss.from_config(None) == {}
    assert loss(torch.zeros(3, 4), torch.ones(3, 4)).tolist() == [2.0] * 3


def test_negative_beta_raises():
    with pytest.raises(ConfigError, match=r"^MODEL\.RETINANET\.SMOOTH_L1_LOSS_BETA must be >= 0"):
        build("smooth_l1", SMOOTH_L1_LOSS_BETA=-0.1)


def test_elementwise_is_not_inherited():
    """A subclass may override ``__call__``, so it has to declare ``elementwise`` itself."""

    class Derived(SmoothL1):
        pass

    assert SmoothL1().is_elementwise() and not Derived().is_elementwise()
    assert not build("giou").is_elementwise()
