"""The faults that are planted, by section of docs/reliability.md."""

import codecs
import io
import json
import math
import os
import pickle
from collections import OrderedDict

import cv2
import numpy as np
import safetensors.torch
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from tests.faults.planting import CLASSES, SIDE, Fault

FAULTS: list[Fault] = []


def plant(section, what, outcome, says="", needs_run=False):
    """Register the function as a fault."""

    def register(function):
        FAULTS.append(Fault(section, what, function, outcome, says, needs_run))
        return function

    return register


# ---- images


def _image_fault(
    what, change, outcome="error", says=r"cannot read the image .*\.jpg", suffix="jpg"
):
    @plant("Images", what, outcome, says, needs_run=True)
    def _(world):
        path = world.image(suffix=suffix)
        path.write_bytes(change(path.read_bytes()))


_image_fault("JPEG cut in half", lambda data: data[: len(data) // 2])
_DAMAGED = r"the image .*\.jpg is damaged \(Corrupt JPEG data"
_image_fault(
    "JPEG cut, with an end marker",
    lambda data: data[: len(data) // 2] + b"\xff\xd9",
    says=_DAMAGED,
)
_image_fault(
    "JPEG with other bytes in the middle",
    lambda data: data[:700] + b"\xff\xc0" * 40 + data[780:],
    says=_DAMAGED,
)
_image_fault(
    "PNG cut in half",
    lambda data: data[: len(data) // 2],
    says=r"cannot read the image .*\.png",
    suffix="png",
)
_image_fault("text file named .jpg", lambda data: b"not an image")


@plant("Images", "file of 0 bytes", "error", r"image files of 0 bytes.*\.jpg")
def _(world):
    world.image().write_bytes(b"")


@plant("Images", "missing file", "error", r"image files are missing.*\.jpg")
def _(world):
    world.image().unlink()


@plant("Images", "missing file of the test set", "error", r"image files are missing.*val/1\.jpg")
def _(world):
    world.image("val").unlink()


@plant("Images", "folder instead of a file", "error", r"folders for images.*\.jpg")
def _(world):
    path = world.image()
    path.unlink()
    path.mkdir()


@plant("Images", "PNG of 16 bits", "error", r"\.png has more than 8-bit values", needs_run=True)
def _(world):
    pixels = np.full((SIDE, SIDE), 40_000, np.uint16)
    cv2.imwrite(str(world.image(suffix="png")), pixels)


@plant(
    "Images",
    "TIFF of floats from 0 to 1",
    "error",
    r"\.png has floating-point values",
    needs_run=True,
)
def _(world):
    path = world.image(suffix="png")
    Image.fromarray(np.full((SIDE, SIDE), 0.5, np.float32)).save(path, "TIFF")


@plant("Images", "other size than in the JSON", "error", r"1\.jpg.*64", needs_run=True)
def _(world):
    cv2.imwrite(str(world.image()), np.zeros((SIDE, SIDE + 10, 3), np.uint8))


@plant("Images", "PNG named .jpg", "same", needs_run=True)
def _(world):
    path = world.image()
    cv2.imwrite(str(path.with_suffix(".png.png")), cv2.imread(str(path)))
    path.with_suffix(".png.png").rename(path)


# ---- annotation files


def _json_fault(what, change, outcome="error", says="", split="train"):
    @plant("Annotation files", what, outcome, says)
    def _(world):
        changed = change(world.coco[split])
        if isinstance(changed, bytes):
            world.json_bytes[split] = changed


def _dump(content, encoding="utf-8"):
    return json.dumps(content, ensure_ascii=False).encode(encoding)


def _latin(content):
    content["categories"][0]["name"] = "café"
    return _dump(content, "latin-1")


def _each(key, change):
    """A change of every entry of a list."""

    def apply(content):
        for entry in content[key]:
            change(entry)

    return apply


def _first(key, change):
    return lambda content: change(content[key][0])


_json_fault("cut in half", lambda c: _dump(c)[:400], says=r"train\.json: is not JSON: it ends")
_json_fault("empty", lambda c: b"", says=r"train\.json: is empty")
_json_fault("zeros, as after a power cut", lambda c: bytes(99), says=r"train\.json: is empty")
_json_fault("a list", lambda c: b"[]", says=r"train\.json: holds a list")
_json_fault("byte-order mark", lambda c: codecs.BOM_UTF8 + _dump(c), "same")
_json_fault("UTF-16", lambda c: _dump(c, "utf-16"), "same")
_json_fault("Latin-1", _latin, says=r"train\.json: is not UTF-8: byte 0xe9 in line 1")
_json_fault("no images", lambda c: c["images"].clear(), says=r"train\.json: has no images")
_json_fault(
    "test set without images",
    lambda c: c["images"].clear(),
    says=r"val\.json: has no images",
    split="val",
)
_json_fault(
    "no annotations", lambda c: c["annotations"].clear(), says=r"train\.json: has no annotations"
)
_json_fault("no categories", lambda c: c.pop("categories"), says=r"train\.json: has no categories")
_json_fault(
    "crowds only", _each("annotations", lambda a: a.update(iscrowd=1)), says="crowd boxes only"
)
_json_fault(
    "no width and height",
    _first("images", lambda i: [i.pop("width"), i.pop("height")]),
    says="images whose width or height is missing",
)
_json_fault(
    "no file_name",
    _first("images", lambda i: i.pop("file_name")),
    says="images without a file_name",
)
_json_fault(
    "two images of one id",
    lambda c: c["images"][1].update(id=1),
    says="entries of images with the id of another",
)
_json_fault(
    "two annotations of one id",
    lambda c: c["annotations"][1].update(id=1),
    says="entries of annotations with the id of another",
)
_json_fault(
    "annotation without an id",
    _first("annotations", lambda a: a.pop("id")),
    says="entries of annotations without an id",
)
_json_fault(
    "annotation of an unknown image",
    lambda c: c["annotations"].append({**c["annotations"][0], "id": 999, "image_id": 999}),
    "same",
)
_json_fault(
    "category_id 99",
    _first("annotations", lambda a: a.update(category_id=99)),
    says="category_id is none of the categories.*99",
)
_json_fault(
    'category_id "3"',
    _first("annotations", lambda a: a.update(category_id="3")),
    says="category_id is none of the categories.*'3'",
)
_json_fault(
    "category ids with gaps",
    lambda c: [
        c["categories"][2].update(id=90),
        *[a.update(category_id=90) for a in c["annotations"] if a["category_id"] == 3],
    ],
    "same",
)


def _renumber(content):
    """The same classes with other ids."""
    content["categories"] = [{**c, "id": 4 - c["id"]} for c in content["categories"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = 4 - annotation["category_id"]


_json_fault(
    "classes of the test set in another order",
    _renumber,
    says="class 0 is 'two', but 'zero' in",
    split="val",
)
_json_fault("no area", _each("annotations", lambda a: a.pop("area")), "same", split="val")
_json_fault("no iscrowd", _each("annotations", lambda a: a.pop("iscrowd")), "same", split="val")
_json_fault(
    "polygon of one box, empty for another",
    lambda c: [
        a.update(segmentation=s) for a, s in zip(c["annotations"], ([[1, 1, 9, 1, 9, 9]], []))
    ],
    "same",
    split="val",
)


# ---- boxes


def _box_fault(what, box, outcome="error", says="", split="train", every=False):
    @plant("Boxes", what, outcome, says)
    def _(world):
        for annotation in world.coco[split]["annotations"][: None if every else 1]:
            annotation["bbox"] = box(annotation["bbox"]) if callable(box) else box


_box_fault("NaN", [math.nan, 1, 20, 20], says="boxes with NaN.*annotation 1 of 1.jpg")
_box_fault("NaN in the test set", [math.nan, 1, 20, 20], says="boxes with NaN", split="val")
_box_fault("infinite", [1, 1, math.inf, 20], says="boxes with an infinite number")
_box_fault("1e30 wide", [1, 1, 1e30, 20], says="a hundred times as large")
_box_fault("negative width and height", [40, 40, -20, -20], says="negative width or height")
_box_fault(
    "XYXY instead of XYWH",
    lambda b: [b[0] + 20, b[1] + 20, b[0] + b[2] + 20, b[1] + b[3] + 20],
    says=r"fit as \[x1, y1, x2, y2\]",
    every=True,
)
_box_fault(
    "shares of the image", lambda b: [v / SIDE for v in b], says="between 0 and 1", every=True
)
_box_fault("three numbers", [1, 2, 3], says="boxes that are not four numbers")
_box_fault("texts", ["1", "2", "30", "40"], says="boxes that are not four numbers")
_box_fault("null", None, says="annotations without a bbox")
_box_fault("outside its image", [100, 100, 20, 20], "warning", "boxes outside their image")
_box_fault("without area", [10, 10, 0, 20], "warning", "boxes without area")


@plant("Boxes", "no bbox", "error", "annotations without a bbox")
def _(world):
    del world.coco["train"]["annotations"][0]["bbox"]


# ---- configs


def _config_fault(what, overrides, says, outcome="error"):
    @plant("Configs", what, outcome, says)
    def _(world):
        world.overrides = overrides.split()


def _yaml_fault(what, text, says):
    @plant("Configs", what, "error", says)
    def _(world):
        world.write()
        data = text(world) if callable(text) else text
        world.yaml_bytes = data.replace(b"MARKER", str(world.marker).encode())


_RUN = b"""SOLVER: {BASE_LR: !!python/object/apply:os.system ["touch 'MARKER'"]}\n"""
_yaml_fault("tag that runs a command", _RUN, "os.system")


@plant("Configs", "tag that runs a command, in a base", "error", "os.system")
def _(world):
    text = _RUN.replace(b"MARKER", str(world.marker).encode())
    (world.root / "base.yaml").write_bytes(text)
    world.yaml_bytes = b"_BASE_: base.yaml\n"


@plant("Configs", "base that inherits the config", "error", "inherits itself")
def _(world):
    (world.root / "base.yaml").write_bytes(b"_BASE_: config.yaml\n")
    world.yaml_bytes = b"_BASE_: base.yaml\n"


_yaml_fault("config that is its own base", b"_BASE_: config.yaml\n", "inherits itself")
_yaml_fault("missing base", b"_BASE_: nothing.yaml\n", "there is no file")
_yaml_fault(
    "a key twice", lambda w: w.config_file.read_bytes() + b"SEED: 2\n", "'SEED' is there twice"
)
_yaml_fault("tab", b"SOLVER:\n\tBASE_LR: 1\n", "cannot read")
_yaml_fault("empty file", b"", "is not a mapping of keys")
_yaml_fault("binary file", bytes(range(256)), "cannot read")
_yaml_fault("unknown key", b"SOLVER: {BASE_LRR: 1}\n", "did you mean 'SOLVER.BASE_LR'")
_yaml_fault("list for a number", b"SOLVER: {MAX_ITER: [1, 2]}\n", "Type mismatch")
_config_fault("MAX_ITER -5", "SOLVER.MAX_ITER -5", "SOLVER.MAX_ITER: must be")
_config_fault("NUM_WORKERS -1", "DATALOADER.NUM_WORKERS -1", "DATALOADER.NUM_WORKERS: must be")
_config_fault("BASE_LR -.03", "SOLVER.BASE_LR -0.03", "SOLVER.BASE_LR: must be")
_config_fault("BASE_LR nan", "SOLVER.BASE_LR float('nan')", "SOLVER.BASE_LR|BASE_LR")
_config_fault(
    "CHECKPOINT_PERIOD 0", "SOLVER.CHECKPOINT_PERIOD 0", "SOLVER.CHECKPOINT_PERIOD: must be"
)
_config_fault(
    "NUM_CLASSES 80 for 3 classes",
    "MODEL.RETINANET.NUM_CLASSES 80",
    "MODEL.RETINANET.NUM_CLASSES: is 80, but fault_train has 3",
)
_config_fault("override without a value", "SOLVER.BASE_LR", "overrides")
_config_fault(
    "unregistered dataset", "DATASETS.TRAIN ('nothing',)", "DATASETS.TRAIN: no dataset 'nothing'"
)


# ---- weights, evaluated


def _state_dict(world, **keys):
    cfg = get_cfg()
    config = {**world.config, "VERSION": 2}
    cfg.merge_from_other_cfg(type(cfg)(config))
    cfg.MODEL.RETINANET.NUM_CLASSES = keys.get("num_classes", len(CLASSES))
    torch.manual_seed(0)
    return build_model(cfg).state_dict()


def _weights_fault(what, content, outcome="error", says="", name="weights.pth"):
    @plant("Weights, --eval-only", what, outcome, says, needs_run=True)
    def _(world):
        world.eval_only = True
        world.save_weights(content(world), name)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _hostile_pickle(world):
    return {"model": _arrays(_state_dict(world)), "__author__": "x", "note": Touch(world.marker)}


def _arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def _old_format(world):
    buffer = io.BytesIO()
    content = {"model": _state_dict(world), "note": Touch(world.marker)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _with_nan(world):
    state = _state_dict(world)
    state["head.cls_score.weight"][0, 0] = math.nan
    return {"model": state}


_weights_fault(".pkl that runs code", _hostile_pickle, says="holds .*mkdir", name="weights.pkl")
_weights_fault(
    ".pth that runs code",
    lambda w: {"model": _state_dict(w), "x": Touch(w.marker)},
    says="holds .*mkdir",
)
_weights_fault("old .pth that runs code", _old_format, says="holds .*mkdir")
_weights_fault(
    "pickle of protocol 0 that runs code",
    lambda w: pickle.dumps(Touch(w.marker), 0),
    says="weights",
    name="weights.pkl",
)
_weights_fault(
    "weights of another model",
    lambda w: {"model": {"fc.weight": torch.ones(3)}},
    says="weights",
)
_weights_fault("empty state dict", lambda w: {"model": {}}, says="no weights file|no tensors")
_weights_fault(
    "weights of 7 classes for 3",
    lambda w: {"model": _state_dict(w, num_classes=7)},
    says="7",
)
_weights_fault("NaN in the weights", _with_nan, says="finite|NaN")
_weights_fault("a list", lambda w: [1, 2], says="holds a list and not a state dict")
_weights_fault("web page", lambda w: b"<!DOCTYPE html><html>404</html>", says="a web page")
_weights_fault(
    "git-lfs pointer",
    lambda w: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    says="a git-lfs pointer",
)
_weights_fault("file of 0 bytes", lambda w: b"", says="is empty")
_weights_fault("cut in half", lambda w: _cut(w), says="damaged|cut|is not")


def _cut(world):
    buffer = io.BytesIO()
    torch.save({"model": _state_dict(world)}, buffer)
    return buffer.getvalue()[:100_000]


@plant("Weights, --eval-only", "missing file", "error", "MODEL.WEIGHTS: no file")
def _(world):
    world.eval_only = True
    world.config["MODEL"]["WEIGHTS"] = str(world.root / "nothing.pth")


@plant("Weights, --eval-only", "no weights named", "error", "set MODEL.WEIGHTS")
def _(world):
    world.eval_only = True


# The same weights in other files: detections equal those of {"model": state dict}.
_weights_fault("state dict alone", _state_dict, "same")
_weights_fault('{"state_dict": ...}', lambda w: {"state_dict": _state_dict(w), "epoch": 3}, "same")
_weights_fault(
    "of Lightning, names with a prefix",
    lambda w: {
        "state_dict": {f"model.{k}": v for k, v in _state_dict(w).items()},
        "pytorch-lightning_version": "2",
    },
    "same",
)
_weights_fault(
    'names with "module."',
    lambda w: {"model": OrderedDict((f"module.{k}", v) for k, v in _state_dict(w).items())},
    "same",
)
_weights_fault(
    "numpy scalars beside the weights",
    lambda w: {"model": _state_dict(w), "best": np.float64(3.5)},
    "same",
)
_weights_fault(
    "safetensors",
    lambda w: safetensors.torch.save(_state_dict(w)),
    "same",
    name="weights.safetensors",
)
_weights_fault(
    "pickle of arrays, of Detectron2's model zoo",
    lambda w: {"model": _arrays(_state_dict(w)), "__author__": "x"},
    "same",
    name="weights.pkl",
)


@plant("Weights, --eval-only", "DATASETS.TRAIN that is not there", "same", needs_run=True)
def _(world):
    world.eval_only = True
    world.save_weights({"model": _state_dict(world)})
    world.config["DATASETS"]["TRAIN"] = ["not_on_this_machine"]
