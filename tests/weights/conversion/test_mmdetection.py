"""MMDetection's RetinaNets, against its forward pass written again from its documented code.

MMDetection itself needs mmcv, which has no build for current versions of PyTorch.
"""

import pytest
import torch
import torchvision
import yaml
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights.conversion.mmdetection import SOURCE

STRIDES = (8, 16, 32, 64, 128)
K, A, CHANNELS = 5, 9, 32


class ConvModule(nn.Module):
    """A conv, perhaps GroupNorm (then the conv has no bias), perhaps ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, norm=False, relu=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=not norm)
        self.gn = nn.GroupNorm(32, c_out) if norm else nn.Identity()
        self.relu = relu

    def forward(self, x):
        x = self.gn(self.conv(x))
        return x.relu() if self.relu else x


class FPN(nn.Module):
    """``start_level=1``, ``add_extra_convs='on_input'``, ``relu_before_extra_convs=False``."""

    def __init__(self, in_channels, on_input=True):
        super().__init__()
        self.on_input = on_input
        self.lateral_convs = nn.ModuleList(ConvModule(c, CHANNELS, 1) for c in in_channels)
        top = in_channels[-1] if on_input else CHANNELS
        self.fpn_convs = nn.ModuleList(
            [ConvModule(CHANNELS, CHANNELS, 3) for _ in in_channels]
            + [ConvModule(top, CHANNELS, 3, 2), ConvModule(CHANNELS, CHANNELS, 3, 2)]
        )

    def forward(self, features):
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features)]
        for i in (2, 1):
            size = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size, mode="nearest")
        out = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        out.append(self.fpn_convs[3](features[-1] if self.on_input else out[-1]))
        return [*out, self.fpn_convs[4](out[-1])]


class RetinaHead(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(CHANNELS, CHANNELS, 3, norm=norm, relu=True) for _ in range(4))
            for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(CHANNELS, A * K, 3, padding=1)
        self.retina_reg = nn.Conv2d(CHANNELS, A * 4, 3, padding=1)

    def forward(self, x):
        scores = boxes = x
        for conv in self.cls_convs:
            scores = conv(scores)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        return self.retina_cls(scores), self.retina_reg(boxes)


class MMRetinaNet(nn.Module):
    """Images, normalised and padded to a multiple of 32 -> detections in their frame."""

    def __init__(self, depth=18, caffe=False, norm=False, on_input=True, groups=1):
        super().__init__()
        resnets = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}
        options = {"groups": groups, "width_per_group": 4} if groups > 1 else {}
        # The names of its parts are those of MMDetection's.
        self.backbone = resnets[depth](weights=None, **options)
        del self.backbone.fc
        if caffe:  # the stride is in the first conv of a block
            for stage in (self.backbone.layer2, self.backbone.layer3, self.backbone.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        wide = 1 if depth == 18 else 4
        self.neck = FPN([128 * wide, 256 * wide, 512 * wide], on_input)
        self.bbox_head = RetinaHead(norm)

    def head_output(self, images):
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            features.append(x)
        return [self.bbox_head(x) for x in self.neck(features[1:])]

    def detect(self, images, size):
        found = []
        for stride, (logits, deltas) in zip(STRIDES, self.head_output(images)):
            height, width = logits.shape[2:]
            scores = logits[0].permute(1, 2, 0).reshape(-1, K).sigmoid()
            keep = (scores > 0.05).nonzero()
            values, order = scores[scores > 0.05].sort(descending=True)
            anchor, class_ = keep[order[:1000]].unbind(1)
            boxes = anchors(height, width, stride)[anchor]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[anchor]
            found.append((decode(boxes, deltas, size), values[:1000], class_))
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # min_bbox_size=0
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        keep = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)[:100]
        return boxes[keep], scores[keep], classes[keep]


def anchors(height, width, stride):
    """``octave_base_scale=4, scales_per_octave=3, ratios=[.5, 1, 2]``, ratios outside."""
    scales = 4 * 2 ** (torch.arange(3) / 3)
    ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    w = (stride / ratios[:, None] * scales).flatten()
    h = (stride * ratios[:, None] * scales).flatten()
    cells = torch.stack((-w, -h, w, h), dim=1) / 2
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4) * stride
    return (shifts + cells).reshape(-1, 4)


def decode(boxes, deltas, size):
    """``DeltaXYWHBBoxCoder`` with ``clip_border``."""
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    limit = torch.log(torch.tensor(1000 / 16))
    centre = centre + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].clamp(-limit, limit).exp()
    height, width = size
    corners = torch.cat((centre - sides / 2, centre + sides / 2), dim=1)
    return corners.clamp(min=0).minimum(torch.tensor([width, height] * 2))


CASES = {
    "R18": {},
    "R18-GN-on-output": {"norm": True, "on_input": False},
    "R50-caffe": {"depth": 50, "caffe": True},
    "X50-32x4d": {"depth": 50, "groups": 32},
}


@pytest.fixture(params=CASES)
def theirs(request):
    torch.manual_seed(0)
    options = CASES[request.param]
    model = MMRetinaNet(**options).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.weight.uniform_(0.5, 1)
                module.bias.normal_(std=0.1)
            if isinstance(module, nn.BatchNorm2d) and "caffe" not in request.param:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            if name.endswith("bn3"):
                module.weight.mul_(0.3)  # keeps the features of a deep network in range
        # scores that differ, about one in ten above the threshold
        image = normalise(picture(0), "caffe" in request.param)
        logits, deltas = (
            torch.cat([x.flatten() for x in xs]) for xs in zip(*model.head_output(image))
        )
        model.bbox_head.retina_cls.weight.mul_(2 / logits.std())
        model.bbox_head.retina_cls.bias.normal_(-5, 1)
        model.bbox_head.retina_reg.weight.mul_(0.4 / deltas.std())
        model.bbox_head.retina_reg.bias.normal_(0, 0.3)
    model.is_caffe = "caffe" in request.param
    return model


def picture(seed, height=120, width=190):
    """(3, H, W) RGB, 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 8, 12, generator=generator) * 255
    return F.interpolate(small, (height, width), mode="bicubic").clamp(0, 255)[0].round()


def normalise(image, caffe):
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    if caffe:
        image, mean, std = image.flip(0), mean.flip(0), torch.ones(3)
    image = (image - mean[:, None, None]) / std[:, None, None]
    height, width = image.shape[1:]
    return F.pad(image, (0, -width % 32, 0, -height % 32))[None]


def converted_model(theirs, tmp_path):
    converted = SOURCE.convert(theirs.state_dict())
    file = tmp_path / "converted.yaml"
    file.write_text(yaml.safe_dump(converted.config))
    cfg = setup_cfg(str(file), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    names = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert converted.state.keys() == names
    model.load_state_dict(converted.state)
    return cfg, model


def test_logits_deltas_and_detections_are_mmdetections(theirs, tmp_path):
    """On an image that is padded. Differences of the head's output: rounding of float32."""
    cfg, ours = converted_model(theirs, tmp_path)
    rgb = picture(1)
    given = rgb if cfg.INPUT.FORMAT == "RGB" else rgb.flip(0)
    images = ours.preprocess_image([{"image": given}])
    assert torch.equal(images.tensor, normalise(rgb, theirs.is_caffe))
    with torch.no_grad():
        features = ours.backbone(images.tensor)
        logits, deltas = ours.head([features[name] for name in ours.head_in_features])
        expected = theirs.head_output(images.tensor)
        boxes, scores, classes = theirs.detect(images.tensor, rgb.shape[1:])
        got = ours([{"image": given}])[0]["instances"]
    for x, y, (their_logits, their_deltas) in zip(logits, deltas, expected):
        for a, b, size in ((x, their_logits, K), (y, their_deltas, 4)):
            scale_major = b.unflatten(1, (3, 3, size)).transpose(1, 2).flatten(1, 3)
            torch.testing.assert_close(a, scale_major, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert len(boxes) == 100
    got = got[got.pred_boxes.area() > 0]
    assert len(got) > 50
    for mine, there, tolerance in (
        (got.pred_boxes.tensor, boxes, 1e-2),
        (got.scores, scores, 1e-4),
        (got.pred_classes, classes, 0),
    ):
        torch.testing.assert_close(mine, there[: len(got)], rtol=0, atol=tolerance)


def test_is_recognised(theirs):
    state = theirs.state_dict()
    assert SOURCE.recognises(state)
    assert not SOURCE.recognises({k: v for k, v in state.items() if "head" not in k})


def test_names_are_cocos_for_80_classes_only():
    model = MMRetinaNet()
    assert SOURCE.convert(model.state_dict()).class_names is None
    model.bbox_head.retina_cls = nn.Conv2d(CHANNELS, A * 80, 3)
    names = SOURCE.convert(model.state_dict()).class_names
    assert len(names) == 80 and names[0] == "person" and names[-1] == "toothbrush"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox_head.cls_convs.0.bn.weight": torch.ones(1)}, "'bbox_head.cls_convs.0.bn.weight'"),
        ({"neck.fpn_convs.4.conv.weight": None}, "'neck.fpn_convs.4.conv.weight' is missing"),
        ({"backbone.bn1.running_var": None}, "'backbone.bn1.running_var' is missing"),
        ({"bbox_head.retina_cls.weight": torch.ones(10, 1, 3, 3)}, "10 channels"),
        ({"backbone.layer1.2.conv1.weight": torch.ones(1)}, r"\[3, 2, 2, 2\] blocks of 2 convs"),
    ],
)
def test_other_models_are_refused_by_name(change, message):
    state = {**MMRetinaNet().state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        SOURCE.convert(state)
