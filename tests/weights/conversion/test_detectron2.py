"""Detectron2's RetinaNets: the names stay, and the config is that of the depth and the head."""

import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model as build_detectron2

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer
from retina_plugin.weights.conversion import convert_file
from retina_plugin.weights.conversion.detectron2 import SOURCE


def zoo_cfg(norm="", groups=1, classes=80):
    """Detectron2's config for COCO, at small widths."""
    from detectron2 import model_zoo

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16, 32
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = groups, 8
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = groups == 1
    cfg.MODEL.FPN.OUT_CHANNELS = 64  # GN has 32 groups
    cfg.MODEL.RETINANET.NORM, cfg.MODEL.RETINANET.NUM_CLASSES = norm, classes
    if groups > 1:
        cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    return cfg


@pytest.mark.parametrize(
    ("norm", "groups", "classes", "suffix"),
    [("", 1, 80, ".pkl"), ("GN", 1, 7, ".pth"), ("BN", 4, 80, ".pth")],
)
def test_network_is_detectron2s(tmp_path, norm, groups, classes, suffix):
    """Of its own model with its config, on its zoo's files and its trainer's."""
    theirs = build_detectron2(zoo_cfg(norm, groups, classes)).eval()
    state, path = theirs.state_dict(), tmp_path / f"model_final{suffix}"
    if suffix == ".pkl":
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}))
    else:
        torch.save({"model": state, "iteration": 1}, path)
    converted = convert_file(path, tmp_path / "ours.safetensors")
    assert (converted.class_names is not None) == (classes == 80)
    cfg = setup_cfg(str(tmp_path / "ours.yaml"), ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == classes
    ours = build_detectron2(cfg).eval()
    checkpointer = Checkpointer(ours)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    checkpointer.check_complete()
    image = [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}]
    for x, y in zip(network_outputs(theirs, image), network_outputs(ours, image), strict=True):
        assert torch.equal(x, y)
    theirs_cfg = zoo_cfg()
    for key in ("SCORE_THRESH_TEST", "NMS_THRESH_TEST", "TOPK_CANDIDATES_TEST"):
        assert cfg.MODEL.RETINANET[key] == theirs_cfg.MODEL.RETINANET[key]
    for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        assert cfg.INPUT[key] == theirs_cfg.INPUT[key]


@torch.no_grad()
def network_outputs(model, inputs):
    """The normalised image, anchors, logits and deltas of all levels: what detections come of."""
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    features = [features[f"p{level}"] for level in range(3, 8)]
    anchors = [boxes.tensor for boxes in model.anchor_generator(features)]
    logits, deltas = model.head(features)
    return [images.tensor, *anchors, *logits, *deltas]


def test_other_anchors_are_refused():
    state = build_detectron2(zoo_cfg()).state_dict()
    state["head.bbox_pred.weight"] = torch.ones(12, 32, 3, 3)
    with pytest.raises(ConfigError, match="3 anchors at a location"):
        SOURCE.convert(state)
