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
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    if groups > 1:
        cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    return cfg


@pytest.mark.parametrize(
    ("norm", "groups", "classes", "suffix"),
    [("", 1, 80, ".pkl"), ("GN", 1, 7, ".pth"), ("BN", 4, 80, ".pth")],
)
def test_detections_are_detectron2s(tmp_path, norm, groups, classes, suffix):
    """Of its own model with its config, on its zoo's files and its trainer's."""
    theirs = build_detectron2(zoo_cfg(norm, groups, classes)).eval()
    torch.nn.init.normal_(theirs.head.cls_score.weight)  # scores without ties
    state, path = theirs.state_dict(), tmp_path / f"model_final{suffix}"
    if suffix == ".pkl":
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}))
    else:
        torch.save({"model": state, "iteration": 1}, path)
    converted = convert_file(path, tmp_path / "ours.safetensors")
    assert (converted.class_names is not None) == (classes == 80)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    # one image; "keep" is Detectron2's order
    opts += ["MODEL.RETINANET.BOXES_OUTSIDE_TEST", "keep"]
    cfg = setup_cfg(str(tmp_path / "ours.yaml"), opts)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == classes
    ours = build_detectron2(cfg).eval()
    checkpointer = Checkpointer(ours)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    checkpointer.check_complete()
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        a, b = (model([{"image": image}])[0]["instances"] for model in (theirs, ours))
    assert len(a) > 0
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_other_anchors_are_refused():
    state = build_detectron2(zoo_cfg()).state_dict()
    state["head.bbox_pred.weight"] = torch.ones(12, 32, 3, 3)
    with pytest.raises(ConfigError, match="3 anchors at a location"):
        SOURCE.convert(state)
