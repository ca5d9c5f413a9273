"""Detectron's RetinaNets, against a forward pass and anchors written again from its code.

Detectron itself needs Caffe2. Its files are detectron/modeling/ResNet.py, FPN.py,
retinanet_heads.py and generate_anchors.py, and detectron/core/test_retinanet.py.
"""

import math
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint
from retina_plugin.weights.conversion import convert_file, find_source
from retina_plugin.weights.conversion.detectron import SOURCE

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STEM, WIDTH, OUT, FPN, K = 8, 8, 16, 16, 5
PRED = ("retnet_cls_pred_fpn3", "retnet_bbox_pred_fpn3")


def make_blobs(depth=50, groups=1, shared=False, classes=K):
    """Random weights with Detectron's names; ``groups`` > 1 makes a ResNeXt."""
    random = np.random.default_rng(depth + groups)
    blobs = {}

    def conv(name, c_out, c_in, size, bias=True):
        blobs[f"{name}_w"] = random.normal(0, (c_in * size**2) ** -0.5, (c_out, c_in, size, size))
        if bias:
            blobs[f"{name}_b"] = random.normal(0, 0.1, c_out)

    def affine(name, channels):
        blobs[f"{name}_bn_s"] = random.uniform(0.5, 1, channels)
        blobs[f"{name}_bn_b"] = random.normal(0, 0.1, channels)

    conv("conv1", STEM, 3, 7, bias=False)
    affine("res_conv1", STEM)
    c_in, width, out = STEM, WIDTH * groups, OUT
    for stage, count in enumerate(BLOCKS[depth], 2):
        for block in range(count):
            name = f"res{stage}_{block}_branch"
            if block == 0:
                conv(f"{name}1", out, c_in, 1, bias=False)
                affine(f"{name}1", out)
            for part, sizes in {
                "2a": (width, c_in, 1),
                "2b": (width, width // groups, 3),
                "2c": (out, width, 1),
            }.items():
                conv(f"{name}{part}", *sizes, bias=False)
                affine(f"{name}{part}", sizes[0])
            c_in = out
        last = f"res{stage}_{count - 1}_sum"
        if stage > 2:
            conv(f"fpn_inner_{last}" + ("_lateral" if stage < 5 else ""), FPN, out, 1)
            conv(f"fpn_{last}", FPN, FPN, 3)
        width, out = width * 2, out * 2
    conv("fpn_6", FPN, c_in, 3)
    conv("fpn_7", FPN, FPN, 3)
    for subnet in ("cls",) if shared else ("cls", "bbox"):
        for i in range(4):
            conv(f"retnet_{subnet}_conv_n{i}_fpn3", FPN, FPN, 3)
    conv(PRED[0], 9 * classes, FPN, 3)
    conv(PRED[1], 36, FPN, 3)
    blobs["conv1_w_momentum"] = np.zeros(3)
    return {name: value.astype("float32") for name, value in blobs.items()}


def detectron_outputs(blobs, x, depth=50, groups=1, shared=False):
    """Logits and deltas of P3 to P7, (N, 9*K, H, W) and (N, 36, H, W), in Detectron's order."""
    b = {name: torch.from_numpy(value) for name, value in blobs.items()}

    def conv(name, x, stride=1, groups=1):
        w = b[f"{name}_w"]
        return F.conv2d(x, w, b.get(f"{name}_b"), stride, w.shape[-1] // 2, groups=groups)

    def affine(name, x):
        return x * b[f"{name}_bn_s"].view(-1, 1, 1) + b[f"{name}_bn_b"].view(-1, 1, 1)

    x = F.max_pool2d(affine("res_conv1", conv("conv1", x, 2)).relu(), 3, 2, 1)
    features = {}
    for stage, count in enumerate(BLOCKS[depth], 2):
        for block in range(count):
            name = f"res{stage}_{block}_branch"
            stride = 2 if block == 0 and stage > 2 else 1
            # RESNETS.STRIDE_1X1 is True for ResNets and False for ResNeXts in its configs
            first, second = (stride, 1) if groups == 1 else (1, stride)
            y = affine(f"{name}2a", conv(f"{name}2a", x, first)).relu()
            y = affine(f"{name}2b", conv(f"{name}2b", y, second, groups)).relu()
            y = affine(f"{name}2c", conv(f"{name}2c", y))
            x = (y + (affine(f"{name}1", conv(f"{name}1", x, stride)) if block == 0 else x)).relu()
        features[stage] = x, f"res{stage}_{count - 1}_sum"
    inner = conv(f"fpn_inner_{features[5][1]}", features[5][0])
    levels = [conv(f"fpn_{features[5][1]}", inner)]
    for stage in (4, 3):
        feature, last = features[stage]
        top = inner.repeat_interleave(2, -1).repeat_interleave(2, -2)
        inner = conv(f"fpn_inner_{last}_lateral", feature) + top
        levels.insert(0, conv(f"fpn_{last}", inner))
    levels.append(conv("fpn_6", features[5][0], 2))
    levels.append(conv("fpn_7", levels[-1].relu(), 2))
    outputs = []
    for level in levels:
        towers = []
        for subnet in ("cls", "cls" if shared else "bbox"):
            y = level
            for i in range(4):
                y = conv(f"retnet_{subnet}_conv_n{i}_fpn3", y).relu()
            towers.append(y)
        outputs.append((conv(PRED[0], towers[0]), conv(PRED[1], towers[1])))
    return outputs


def detectron_anchors(stride):
    """(9, 4) anchors of the first location, whose last pixel is inclusive."""
    anchors = []
    for octave in range(3):
        scale = 4 * 2 ** (octave / 3.0)
        for ratio in (1.0, 2.0, 0.5):
            w = np.round(np.sqrt(stride * stride / ratio))
            h = np.round(w * ratio)
            w, h, centre = w * scale, h * scale, 0.5 * (stride - 1)
            x, y = 0.5 * (w - 1), 0.5 * (h - 1)
            anchors.append([centre - x, centre - y, centre + x, centre + y])
    return np.array(anchors)


def save(path, blobs):
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: ..."}, protocol=2))
    return path


def model_of(config):
    cfg = setup_cfg(str(config), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model, cfg


@pytest.mark.parametrize(
    ("depth", "groups", "shared"),
    [
        (50, 1, False),
        (50, 1, True),
        pytest.param(101, 1, False, marks=pytest.mark.slow),
        (101, 4, False),
    ],
    ids=["R-50", "R-50 with shared tower", "R-101", "X-101"],
)
def test_outputs_are_detectrons(tmp_path, depth, groups, shared):
    """Logits and deltas of each anchor and class, from the file to the model of the config."""
    blobs = make_blobs(depth, groups, shared)
    convert_file(save(tmp_path / "model.pkl", blobs), tmp_path / "ours.pth")
    model, cfg = model_of(tmp_path / "ours.yaml")
    assert cfg.MODEL.RESNETS.DEPTH == depth and cfg.MODEL.RETINANET.NUM_CLASSES == K
    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        features = model.backbone(image)
        logits, deltas = model.head([features[f"p{i}"] for i in range(3, 8)])
        theirs = detectron_outputs(blobs, image, depth, groups, shared)
    anchors = model.anchor_generator([features[f"p{i}"] for i in range(3, 8)])
    for level, (their_logits, their_deltas) in enumerate(theirs):
        stride = 8 * 2**level
        assert logits[level].shape == their_logits.shape
        cells = anchors[level].tensor[:9].numpy()
        expected = detectron_anchors(stride) + [0, 0, 1, 1]  # our last pixel is exclusive
        for a, box in enumerate(expected):
            (same,) = np.flatnonzero(np.abs(cells - box).max(1) < 1e-3 * stride / 8)
            for ours, their in ((logits[level], their_logits), (deltas[level], their_deltas)):
                ours_a, their_a = (x.unflatten(1, (9, -1)) for x in (ours, their))
                torch.testing.assert_close(ours_a[:, same], their_a[:, a], rtol=1e-4, atol=1e-4)
        assert len({tuple(cell) for cell in cells}) == 9


def test_anchors_differ_from_detectron2s_by_an_eighth_of_their_area():
    """The reason for DetectronAnchorGenerator: its boxes are decoded from these."""
    ours = setup_cfg("retina_R50_800.yaml", ["MODEL.DEVICE", "cpu"])
    sizes = np.array(ours.MODEL.ANCHOR_GENERATOR.SIZES)
    ratios = []
    for level in range(5):
        boxes = detectron_anchors(8 * 2**level)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
        ratios.append(areas / np.repeat(sizes[level] ** 2, 3))
    assert math.isclose(np.abs(np.array(ratios) - 1).max(), 0.125)


def test_config_is_detectrons(tmp_path):
    convert_file(save(tmp_path / "model.pkl", make_blobs()), tmp_path / "ours.pth")
    cfg = setup_cfg(str(tmp_path / "ours.yaml"))
    assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
    assert cfg.MODEL.PIXEL_STD == [1, 1, 1] and cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.5
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    text = (tmp_path / "ours.yaml").read_text()
    assert (
        "# Detect with it: retina predict --config-file" in text and "model.pkl (detectron)" in text
    )


def test_eighty_classes_are_cocos():
    names = SOURCE.convert(as_tensors(make_blobs(classes=80))).class_names
    assert names[0] == "person" and names[79] == "toothbrush" and len(names) == 80
    assert SOURCE.convert(as_tensors(make_blobs())).class_names is None


def as_tensors(blobs):
    return {k: torch.from_numpy(v) for k, v in blobs.items() if not k.endswith("_momentum")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("fpn_6_w"), "'fpn_6_w' is missing"),
        (lambda b: b.update(mask_fcn1_w=torch.ones(1)), "'mask_fcn1_w' is not a blob"),
        (lambda b: b.update({f"{PRED[0]}_w": torch.ones(9 * 81, FPN, 3, 3)}), "SOFTMAX True"),
        (lambda b: b.update({f"{PRED[1]}_w": torch.ones(36 * K, FPN, 3, 3)}), "CLASS_SPECIFIC"),
        (lambda b: b.update({f"{PRED[1]}_w": torch.ones(12, FPN, 3, 3)}), "only nine anchors"),
        (lambda b: b.pop("res5_2_branch2a_w"), "backbone"),
    ],
    ids=["no P6", "other blob", "softmax", "class-specific", "three anchors", "no block"],
)
def test_what_cannot_be_converted_is_one_line(change, message):
    blobs = as_tensors(make_blobs())
    change(blobs)
    if message == "backbone":  # a whole block
        for name in [n for n in blobs if n.startswith("res5_2_branch")]:
            del blobs[name]
    with pytest.raises(ConfigError, match=message):
        SOURCE.convert(blobs)


def test_pickle_as_MODEL_WEIGHTS_loads_completely(tmp_path, log):
    """P6, P7 and the head too, which Detectron2's loader leaves as they were initialised."""
    path = save(tmp_path / "model.pkl", make_blobs())
    convert_file(path, tmp_path / "ours.pth")
    expected, cfg = model_of(tmp_path / "ours.yaml")
    log.clear()
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(str(path))
    checkpointer.check_complete()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    (line,) = [r.getMessage() for r in log.records if r.name == "retina_plugin"]
    assert line.startswith("Recognised ") and "retina convert" in line


def test_contradicting_config_is_one_warning(tmp_path, log):
    path = save(tmp_path / "model.pkl", make_blobs())
    convert_file(path, tmp_path / "ours.pth")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.PIXEL_STD", "[57.4, 57.1, 58.4]"]
    cfg = setup_cfg(str(tmp_path / "ours.yaml"), [*opts, "MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    Checkpointer(build_model(cfg)).load(str(path))
    (line,) = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert "MODEL.PIXEL_STD [1.0, 1.0, 1.0], MODEL.RESNETS.STRIDE_IN_1X1 True" in line


def test_source_is_recognised_in_the_file(tmp_path):
    state = read_checkpoint(save(tmp_path / "model.pkl", make_blobs()))["model"]
    assert find_source(state) is SOURCE
