"""FPN P3-P7: strides, the source of P6, widths."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.modeling.pyramid import TopLevels, freeze_unused_levels


def cfg_with(depth, width=64, source="res5", name="build_retina_fpn_backbone", groups=1):
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.P6_SOURCE = source
    return cfg


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("source", ["res5", "p5"])
def test_levels_are_p3_to_p7_at_their_strides(depth, source):
    backbone = build_backbone(cfg_with(depth, width=64, source=source))
    features = backbone(torch.zeros(1, 3, 128, 128))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for level, feature in enumerate(features.values(), start=3):
        assert feature.shape == (1, 16, 128 // 2**level, 128 // 2**level)
    assert [s.stride for s in backbone.output_shape().values()] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize("source", ["res5", "p5"])
def test_p6_source_selects_the_input_of_p6(source):
    backbone = build_backbone(cfg_with(18, source=source)).eval()
    image = torch.randn(1, 3, 64, 64)
    features = backbone(image)
    below = features["p5"] if source == "p5" else backbone.bottom_up(image)["res5"]
    p6 = backbone.top_block.p6(below)
    assert torch.equal(features["p6"], p6)
    assert torch.equal(features["p7"], backbone.top_block.p7(p6.relu()))


@pytest.mark.parametrize("depth, groups", [(18, 1), (50, 1), (50, 32)])
def test_parameters_are_detectron2s(depth, groups):
    ours = build_backbone(cfg_with(depth, groups=groups))
    theirs = build_backbone(
        cfg_with(depth, groups=groups, name="build_retinanet_resnet_fpn_backbone")
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    image = torch.randn(1, 3, 64, 64)
    for x, y in zip(ours(image).values(), theirs(image).values()):
        assert torch.equal(x, y)


def test_resnet18_can_be_narrow():
    backbone = build_backbone(cfg_with(18, width=8))
    assert backbone.bottom_up.output_shape()["res5"].channels == 64


def test_frozen_stages_have_no_gradient():
    cfg = cfg_with(18, width=8)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    bottom_up = build_backbone(cfg).bottom_up
    trained = {n.split(".")[0] for n, p in bottom_up.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


LEVELS = ["p3", "p4", "p5", "p6", "p7"]
SUBSETS = [LEVELS, LEVELS[:3], LEVELS[2:], ["p4", "p6"], ["p3"], ["p6"], ["p7"]]


def detector_cfg(levels, *args, **kwargs):
    cfg = cfg_with(18, *args, **kwargs)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "FocalRetinaNet"
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR.SIZES = levels, [[32.0]]
    return cfg


@pytest.mark.parametrize("levels", SUBSETS, ids="-".join)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("res5", "build_retina_fpn_backbone"),
        ("p5", "build_retina_fpn_backbone"),
        ("res5", "build_retinanet_resnet_fpn_backbone"),
    ],
)
def test_parameters_of_unused_levels_are_frozen(levels, source, name):
    """Exactly those that no used level depends on."""
    backbone = build_model(detector_cfg(levels, source=source, name=name)).backbone
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    backbone.requires_grad_(True)
    names, parameters = zip(*backbone.named_parameters())
    features = backbone(torch.randn(1, 3, 128, 128))
    total = sum(features[level].sum() for level in levels)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert frozen == {n for n, gradient in zip(names, gradients) if gradient is None}


def test_backbone_of_your_own_is_not_frozen():
    class OwnPyramid(FPN):
        pass

    pyramid = build_backbone(cfg_with(18, width=8))
    pyramid.__class__ = OwnPyramid
    assert freeze_unused_levels(pyramid, ["p3"]) is pyramid
    pyramid.__class__, pyramid.top_block.__class__ = FPN, type("OwnTop", (TopLevels,), {})
    freeze_unused_levels(pyramid, ["p3"])
    assert all(p.requires_grad for p in pyramid.parameters())


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("levels", SUBSETS[1:4], ids="-".join)
def test_subset_of_the_levels_is_trained_on_several_processes(one_process, levels):
    """DistributedDataParallel finds a gradient of each parameter in every iteration."""
    cfg = detector_cfg(levels, width=8)
    model = torch.nn.parallel.DistributedDataParallel(build_model(cfg).train())
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    instances.gt_classes = torch.tensor([1])
    batch = [{"image": torch.zeros(3, 64, 64), "instances": instances}]
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    for _ in range(3):
        with EventStorage():
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()


def test_unknown_source_raises():
    with pytest.raises(ConfigError, match="MODEL.RETINANET.P6_SOURCE.*'c5'.*res5, p5"):
        build_backbone(cfg_with(18, source="c5"))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("height", [1, 2, 3, 8])
@pytest.mark.parametrize("channels", [16, 24, 64])
def test_bfloat16_is_right_on_narrow_maps(height, width, channels):
    """P6, P7 and all gradients are those of float64, apart from rounding, also of one column.

    Memory that is freed before holds large numbers, which a convolution that reads it would show.
    """
    torch.manual_seed(0)
    levels = TopLevels(channels, channels)
    exact = copy.deepcopy(levels).double()
    x = torch.randn(2, channels, height, width)
    large = [torch.full((2**size,), 1e6) for size in range(4, 18) for _ in range(3)]
    del large
    results = []
    for model, feature in ((levels, x), (exact, x.double())):
        feature.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is levels):
            outputs = model(feature)
        sum(output.double().square().sum() for output in outputs).backward()
        results.append([*outputs, feature.grad, *(p.grad for p in model.parameters())])
    for found, expected in zip(*results):
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= 0.02 * expected.norm()
