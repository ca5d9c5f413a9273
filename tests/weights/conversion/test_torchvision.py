"""A converted RetinaNet computes what torchvision's own computes, stage by stage.

The models are torchvision's, with random weights. The statistics of their batch norms are those of
real activations, and some channels are almost dead, because there eps matters.

The numbers: ``python -m pytest -m slow -s tests/weights/conversion/test_torchvision.py``
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torchvision.models.detection import (
    RetinaNet,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina_plugin.data import FastMapper
from retina_plugin.doctor.config import check_config
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights.conversion.torchvision import SOURCE, convert

A = 9
# A location's anchors by size, then ratio (ours), as indices of torchvision's order.
OURS = [ratio * 3 + size for size in range(3) for ratio in range(3)]
THEIRS = [size * 3 + ratio for ratio in range(3) for size in range(3)]

SIZES = {"min_size": 160, "max_size": 266}
LARGE = {"min_size": 320, "max_size": 533}


def picture(height, width, seed):
    """A smooth random image with noise, (3, H, W) in [0, 1], whose pixels are whole numbers/255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0] * 255
    noise = torch.randn(3, height, width, generator=generator) * 12
    return (smooth + noise).clamp(0, 255).round() / 255


def randomise(model, images):
    """Norms as after a training: statistics of real activations, a few almost dead channels."""
    generator = torch.Generator().manual_seed(3)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.GroupNorm)):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 0.5 + 0.5)
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model.backbone(model.transform(images)[0].tensors)
    for norm in norms:
        norm.eval()
    modules = dict(model.backbone.body.named_modules())
    for name, norm in modules.items():
        if isinstance(norm, nn.BatchNorm2d):
            conv = modules[name.replace("bn", "conv") if "bn" in name else name[:-1] + "0"]
            shrink = (1e-4 / norm.running_var[:4]).sqrt()
            conv.weight[:4] *= shrink[:, None, None, None]
            norm.running_mean[:4] *= shrink
            norm.running_var[:4] = 1e-4


def spread_scores(model, image):
    """Scale the last convs, so that one score in 5000 is above the threshold."""
    features = list(model.backbone(model.transform([image])[0].tensors).values())
    output, head = model.head(features), model.head.classification_head
    logits = output["cls_logits"] - head.cls_logits.bias[0]
    scale = 4 / logits.std()
    head.cls_logits.weight *= scale
    sample = (logits * scale).flatten()[:: max(1, logits.numel() // 500_000)]
    head.cls_logits.bias.fill_(float(-2.94 - sample.quantile(1 - 2e-4)))
    model.head.regression_head.bbox_reg.weight *= 0.4 / output["bbox_regression"].std()


def freeze_without_eps(model):
    """The batch norms of torchvision's COCO weights of the first version."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, eps=0.0)
                frozen.load_state_dict(child.state_dict())
                setattr(module, name, frozen)


MAKERS = {
    "v1": partial(retinanet_resnet50_fpn, weights=None, weights_backbone=None),
    "v2": partial(retinanet_resnet50_fpn_v2, weights=None, weights_backbone=None),
}
MAKERS["v1 without eps"] = MAKERS["v1"]


def make(version, sizes, **options):
    torch.manual_seed(1)
    model = MAKERS[version](**sizes, **options).eval()
    with torch.no_grad():
        image = picture(sizes["min_size"], sizes["min_size"] * 3 // 2, 5)
        randomise(model, [image, picture(*image.shape[1:], 8)])
        if version == "v1 without eps":
            freeze_without_eps(model)
        spread_scores(model, image)
    return model


def ours_of(state, folder, **options):
    """(model, config) from what ``convert`` gives."""
    assert SOURCE.recognises(state)
    converted = convert(state, **options)
    path = folder / "converted.yaml"
    path.write_text(yaml.safe_dump(converted.config))
    cfg = setup_cfg(str(path), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    model.load_state_dict(converted.state, strict=True)
    return model, cfg


def to_level(x, size):
    """torchvision's (N, HWA, D) of a level as our (N, A*D, H, W)."""
    n, _, depth = x.shape
    x = x.view(n, *size, A, depth)[:, :, :, OURS]
    return x.permute(0, 3, 4, 1, 2).reshape(n, A * depth, *size)


def in_their_order(x, depth):
    """Our (N, A*D, H, W) as torchvision's (N, HWA, D)."""
    x = permute_to_N_HWA_K(x, depth)
    return x.unflatten(1, (-1, A))[:, :, THEIRS].flatten(1, 2)


class Comparison:
    """Both models on the same input tensor."""

    @torch.no_grad()
    def __init__(self, theirs, ours, images):
        self.images, self.ours, self.theirs = images, ours, theirs
        inputs, _ = theirs.transform(images)
        self.sizes = inputs.image_sizes
        self.expected = list(theirs.backbone(inputs.tensors).values())
        self.expected_head = theirs.head(self.expected)
        self.expected_anchors = theirs.anchor_generator(inputs, self.expected)[0]
        self.expected_found = theirs(images)
        features = ours.backbone(inputs.tensors)
        self.features = [features[name] for name in ours.head_in_features]
        self.logits, self.deltas = ours.head(self.features)
        self.anchors = ours.anchor_generator(self.features)

    def differences(self):
        """Largest difference of each stage, in units of its largest number."""
        K = self.ours.num_classes
        stages = {
            "features": (self.features, self.expected),
            "logits": ([self._cat(self.logits, K)], [self.expected_head["cls_logits"]]),
            "deltas": ([self._cat(self.deltas, 4)], [self.expected_head["bbox_regression"]]),
        }
        return {
            name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pair))
            for name, pair in stages.items()
        }

    def _cat(self, levels, depth):
        return torch.cat([in_their_order(x, depth) for x in levels], dim=1)

    def assert_anchors_equal(self):
        ours = torch.cat(
            [a.tensor.unflatten(0, (-1, A))[:, THEIRS].flatten(0, 1) for a in self.anchors]
        )
        assert torch.equal(ours, self.expected_anchors)

    @torch.no_grad()
    def detections(self, head=None):
        """Ours in the frames of the images, from our head's output or from another."""
        found = self.ours.inference(self.anchors, *(head or (self.logits, self.deltas)), self.sizes)
        return [self.ours.postprocess(x, *i.shape[1:]) for x, i in zip(found, self.images)]

    def their_head_output(self):
        sizes = [x.shape[2:] for x in self.expected]
        lengths = [h * w * A for h, w in sizes]
        return tuple(
            [to_level(x, size) for x, size in zip(out.split(lengths, dim=1), sizes)]
            for out in (self.expected_head["cls_logits"], self.expected_head["bbox_regression"])
        )


def agreement(found, expected):
    """How far detections agree that differ by rounding: (how many, of how many, pixels).

    Almost equal scores may change places, and the last detections may fall out. So each of
    torchvision's is compared with our nearest of its class and score; those within .1 pixels agree.
    The third number is the largest difference of these.
    """
    distances = []
    for x, y in zip(found, expected):
        assert len(x) == len(y["boxes"])
        distance = (y["boxes"][:, None] - x.pred_boxes.tensor).abs().amax(dim=2)
        same = y["labels"][:, None] == x.pred_classes
        same &= (y["scores"][:, None] - x.scores).abs() < 1e-3
        distances.append(torch.where(same, distance, torch.inf).amin(dim=1))
    near = torch.cat(distances)
    agreeing = near[near < 0.1]
    assert len(agreeing) >= 0.99 * len(near)
    return len(agreeing), len(near), round(float(agreeing.max()), 5)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert torch.equal(x.pred_classes, y["labels"])
        assert torch.equal(x.scores, y["scores"])
        assert torch.equal(x.pred_boxes.tensor, y["boxes"])


def losses(theirs, ours, images):
    """(torchvision's, ours) of two images with objects, on the same input tensor."""
    targets = [
        {
            "boxes": torch.tensor([[12.0, 20, 90, 120], [40, 9, 60, 44]]),
            "labels": torch.tensor([17, 3]),
        },
        {"boxes": torch.tensor([[5.0, 5, 130, 100]]), "labels": torch.tensor([90])},
    ][: len(images)]
    theirs.train()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # frozen, as ours
    with torch.no_grad():
        expected = theirs(images, copy.deepcopy(targets))
        inputs, resized = theirs.transform(images, copy.deepcopy(targets))
        theirs.eval()
        features = ours.backbone(inputs.tensors)
        features = [features[name] for name in ours.head_in_features]
        instances = [
            Instances(size, gt_boxes=Boxes(t["boxes"]), gt_classes=t["labels"])
            for size, t in zip(inputs.image_sizes, resized)
        ]
        with EventStorage():
            got = ours.forward_training(
                ImageList(inputs.tensors, inputs.image_sizes),
                features,
                ours.head(features),
                instances,
            )
    return (
        (expected["classification"], expected["bbox_regression"]),
        (got["loss_cls"], got["loss_box_reg"]),
    )


def detect_file(ours, cfg, image, sizes, folder):
    """Ours from a file with the image, through our mapper."""
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = sizes["min_size"], sizes["max_size"]
    path = folder / "image.png"
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    record = FastMapper(**FastMapper.from_config(cfg, is_train=False))({"file_name": str(path)})
    with torch.no_grad():
        return [ours([record])[0]["instances"]]


def check(version, sizes, shapes, folder):
    """Hold all stages; returns the largest differences."""
    theirs = make(version, sizes)
    ours, cfg = ours_of(theirs.state_dict(), folder)
    assert list(check_config(cfg)) == []
    report = []
    batches = [[picture(*shape, 5)] for shape in shapes]
    if len(shapes) > 1:
        batches.append([picture(*shapes[0], 6), picture(*shapes[1][::-1], 7)])
    for images in batches:
        compared = Comparison(theirs, ours, images)
        compared.assert_anchors_equal()
        assert min(len(x["boxes"]) for x in compared.expected_found) > 50
        assert_equal(compared.detections(compared.their_head_output()), compared.expected_found)
        numbers = compared.differences()
        numbers["detections"] = agreement(compared.detections(), compared.expected_found)
        if version == "v1 without eps":  # folded: the features differ by their rounding
            assert max(numbers["features"], numbers["logits"], numbers["deltas"]) < 2e-4
        else:
            assert numbers["features"] == numbers["logits"] == numbers["deltas"] == 0
            assert_equal(compared.detections(), compared.expected_found)
        what = " and ".join("x".join(map(str, i.shape[1:])) for i in images)
        report.append((f"{what}, largest relative differences", numbers))
    images = batches[-1]
    for name, expected, got in zip(("loss_cls", "loss_box_reg"), *losses(theirs, ours, images)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        report.append((f"{name}, relative difference", float((got - expected).abs() / expected)))
    for shape in shapes:
        image = picture(*shape, 9)
        with torch.no_grad():
            expected = theirs([image])
        found = detect_file(ours, cfg, image, sizes, folder)
        what = f"file of {shape[0]}x{shape[1]} through the mapper, detections"
        report.append((what, agreement(found, expected)))
    return report


def show(version, report):
    for what, numbers in report:
        print(f"torchvision {version}, {what}: {numbers}")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_all_stages_of_a_small_image(version, tmp_path):
    show(version, check(version, SIZES, [(150, 240)], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("version", MAKERS)
def test_all_stages(version, tmp_path):
    """Landscape, portrait, and a size that is not changed; each alone, and two in a batch.

    An image of 320 x 480 has 5 x 8 locations on P6, so these lie 64 x 60 pixels apart.
    """
    show(version, check(version, LARGE, [(320, 480), (431, 287), (300, 450)], tmp_path))


# A model of torchvision's parts on a small backbone, which is built and run in moments.


def small(p6_channels=256):
    """A RetinaNet of five classes on a ResNet-18 without eps."""
    torch.manual_seed(2)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=partial(FrozenBatchNorm2d, eps=0.0),
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(p6_channels, 256),
    )
    model = RetinaNet(backbone, 5, **SIZES).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(1e-4, 0.5)
    return model


@pytest.fixture(scope="module")
def of_18_layers():
    return small()


def old_names(state):
    """Those of torchvision before 0.13 and 0.15: no Conv2dNormActivation in the head and FPN."""
    renamed = {}
    for name, value in state.items():
        if "_head.conv." in name:
            start, index, _, leaf = name.rsplit(".", 3)
            name = f"{start}.{2 * int(index)}.{leaf}"
        if "inner_blocks" in name or "layer_blocks" in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
            name = name.replace("blocks.weight", "blocks.0.weight")
            name = name.replace("blocks.bias", "blocks.0.bias")
        renamed[name] = value
    return renamed


def test_names_of_old_releases_and_prefixes_give_the_same_weights(of_18_layers):
    state = of_18_layers.state_dict()
    old = old_names(state)
    assert "head.regression_head.conv.6.bias" in old and "backbone.fpn.inner_blocks.2.bias" in old
    assert not old.keys() & {"head.regression_head.conv.3.0.bias"}
    expected = convert(state).state
    for other in (old, {f"module.{name}": value for name, value in state.items()}):
        assert SOURCE.recognises(other)
        got = convert(other).state
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("source, channels", [("p5", 256), ("res5", 512)])
def test_own_number_of_classes_and_depth(source, channels, tmp_path):
    """The classes keep torchvision's numbers; without eps, which is folded into the weights."""
    theirs = small(p6_channels=channels)
    ours, cfg = ours_of(theirs.state_dict(), tmp_path)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 5 and cfg.MODEL.RETINANET.P6_SOURCE == source
    assert cfg.MODEL.RESNETS.DEPTH == 18
    compared = Comparison(theirs, ours, [picture(150, 240, 5)])
    assert max(compared.differences().values()) < 1e-4
    compared.assert_anchors_equal()
    converted = convert(theirs.state_dict())
    assert converted.class_names is None
    assert "0 is its background" in converted.notes[1] and "COCO" not in converted.notes[1]


def test_eps_is_that_of_the_published_weights_unless_given(of_18_layers):
    """0 for frozen norms of the first version: another one gives other features."""
    state = of_18_layers.state_dict()
    weight = "backbone.bottom_up.stem.conv1.norm.weight"
    theirs, variance = state["backbone.body.bn1.weight"], state["backbone.body.bn1.running_var"]
    factor = ((variance.double() + 1e-5) / variance.double()).sqrt()
    assert factor.max() > 1.0001
    assert torch.equal(convert(state).state[weight], (theirs.double() * factor).float())
    assert torch.equal(convert(state, bn_eps=1e-5).state[weight], theirs)
    assert "; 0 was taken" in convert(state).notes[0]
    # a norm that counts its batches is not frozen, and overwrite_eps does not change it
    counted = {**state, "backbone.body.bn1.num_batches_tracked": torch.tensor(0)}
    assert torch.equal(convert(counted).state[weight], theirs)
    assert "; 1e-05 was taken" in convert(counted).notes[0]

    state = {**state, "backbone.body.bn1.running_var": torch.zeros(64)}
    with pytest.raises(ConfigError, match="stem.conv1.norm.running_var has a variance of 0"):
        convert(state)
    assert convert(state, bn_eps=1e-5).state


def test_names_of_the_91_classes(of_18_layers):
    state = {**of_18_layers.state_dict()}
    for leaf, shape in (("weight", (9 * 91, 256, 3, 3)), ("bias", (9 * 91,))):
        state[f"head.classification_head.cls_logits.{leaf}"] = torch.zeros(shape)
    converted = convert(state)
    assert converted.class_names[:2] == ["__background__", "person"]
    assert converted.class_names[90] == "toothbrush" and len(converted.class_names) == 91
    assert "COCO's category ids" in converted.notes[1]


def test_what_cannot_be_converted_is_one_line(of_18_layers):
    state = of_18_layers.state_dict()

    def without(text):
        return {name: value for name, value in state.items() if text not in name}

    deltas = "head.regression_head.bbox_reg.weight"
    cases = {
        r"P3 to P7: it has no backbone.fpn.extra_blocks.p6.weight": without("extra_blocks"),
        r"is for 3 anchors at a location": {**state, deltas: torch.zeros(12, 256, 3, 3)},
        r"has 37 channels, which is no multiple of 9": {
            **state,
            "head.classification_head.cls_logits.weight": torch.zeros(37, 256, 3, 3),
        },
        r"backbone.body.layer1.0.se.weight is not a name": {
            **state,
            "backbone.body.layer1.0.se.weight": torch.zeros(1),
        },
        r"inner_blocks.3.0.weight is not a name": {
            **state,
            "backbone.fpn.inner_blocks.3.0.weight": torch.zeros(1),
        },
        r"its backbone has \[2, 2, 2, 1\] blocks of 2 convs": without("layer4.1."),
    }
    for message, bad in cases.items():
        with pytest.raises(ConfigError, match=message):
            convert(bad)
    for other in ({}, {"head.cls_score.weight": torch.zeros(1)}, without("cls_logits")):
        assert not SOURCE.recognises(other)
        with pytest.raises(ConfigError, match="not a RetinaNet of torchvision"):
            convert(other)


def test_converting_changes_no_given_tensor(of_18_layers):
    state = of_18_layers.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    convert(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_more_layers_and_groups(tmp_path):
    """ResNeXt, whose groups are read from the shapes."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnext50_32x4d",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    theirs = RetinaNet(backbone, 3, **SIZES).eval()
    ours, cfg = ours_of(theirs.state_dict(), tmp_path)
    resnets = cfg.MODEL.RESNETS
    assert (resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP) == (50, 32, 4)
    compared = Comparison(theirs, ours, [picture(90, 90, 5)])
    assert max(compared.differences().values()) < 1e-3
