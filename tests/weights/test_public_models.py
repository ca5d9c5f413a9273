"""Public models by name: from the cache of their own library to detections. No network.

The files have random weights, in the layout of the published ones, where the library keeps them.
"""

import dataclasses
import functools
import hashlib
import http.server
import pickle
import re
import shutil
import threading
import uuid
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2 import model_zoo
from detectron2.modeling import build_model
from torchvision.models import detection

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, conversion, read_checkpoint
from retina_plugin.weights.conversion import SOURCES
from retina_plugin.weights.public_models import MODELS, prepare_model

ONE_OF_EACH = [
    "torchvision/retinanet_resnet50_fpn",
    "torchvision/retinanet_resnet50_fpn_v2",
    "detectron2/retinanet_R_50_FPN_1x",
    "detectron/retinanet_R-50-FPN_1x",
    "mmdetection/retinanet_r50_fpn_1x_coco",
]
ONE_OF_EACH = [name for name in ONE_OF_EACH if MODELS[name].source in SOURCES]


# ---- files in the layout of the published ones


def detectron2_model():
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    return build_model(cfg).eval()


def write_detectron2(file, name):
    state = {k: v.numpy() for k, v in lively(detectron2_model().state_dict()).items()}
    data = {"model": state, "__author__": "Detectron2 Model Zoo"}
    file.write_bytes(pickle.dumps(data))


def write_torchvision(file, name):
    torch.manual_seed(0)
    build = getattr(detection, name.partition("/")[2])
    state = build(weights=None, weights_backbone=None).state_dict()
    torch.save(lively(state), file)


def write_detectron(file, name):
    """Caffe2 Detectron: {"blobs": {"conv1_w": ..., "conv1_w_momentum": ...}, "cfg": ...}."""
    blobs = {}
    for key, value in lively(detectron2_model().state_dict()).items():
        if key.startswith("backbone.bottom_up.") and "running" not in key:
            key = key.removeprefix("backbone.bottom_up.").replace("stem.conv1.norm", "res_conv1_bn")
            key = key.replace("stem.conv1", "conv1").replace("shortcut", "branch1")
            key = re.sub(r"\.conv([123])", lambda m: f".branch2{'abc'[int(m[1]) - 1]}", key)
            key = re.sub(r"[._]norm", "_bn", key)
            key = key.replace("_bn.weight", "_bn_s").replace("_bn.bias", "_bn_b")
        elif m := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)\.(\w+)", key):
            block = {"3": "res3_3", "4": "res4_5", "5": "res5_2"}[m[2]]
            inner = "inner_" if m[1] == "lateral" else ""
            key = f"fpn_{inner}{block}_sum{'_lateral' if inner and m[2] != '5' else ''}.{m[3]}"
        elif m := re.fullmatch(r"backbone\.top_block\.p([67])\.(\w+)", key):
            key = f"fpn_{m[1]}.{m[2]}"
        elif m := re.fullmatch(r"head\.(cls|bbox)_subnet\.(\d)\.(\w+)", key):
            key = f"retnet_{m[1]}_conv_n{int(m[2]) // 2}_fpn3.{m[3]}"
        elif m := re.fullmatch(r"head\.(cls|bbox)_(?:score|pred)\.(\w+)", key):
            key = f"retnet_{m[1]}_pred_fpn3.{m[2]}"
        else:
            continue  # Detectron folds batch norm's statistics
        blob = key.replace(".weight", "_w").replace(".bias", "_b").replace(".", "_")
        blobs[blob] = value.numpy()
    blobs |= {f"{blob}_momentum": value for blob, value in blobs.items() if "_bn_" not in blob}
    file.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=2))


def write_mmdetection(file, name):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50().state_dict()
    state = {f"backbone.{k}": v for k, v in resnet.items() if not k.startswith("fc.")}
    convs = {f"neck.lateral_convs.{i}": (256, 512 * 2**i, 1) for i in range(3)}
    convs |= {f"neck.fpn_convs.{i}": (256, 256 if i != 3 else 2048, 3) for i in range(5)}
    for branch in ("cls", "reg"):
        convs |= {f"bbox_head.{branch}_convs.{i}": (256, 256, 3) for i in range(4)}
    convs |= {"bbox_head.retina_cls": (720, 256, 3), "bbox_head.retina_reg": (36, 256, 3)}
    for conv, (out, into, side) in convs.items():
        inner = "" if "retina_" in conv else ".conv"
        module = torch.nn.Conv2d(into, out, side)
        state |= {f"{conv}{inner}.{k}": v.detach() for k, v in module.state_dict().items()}
    meta = {
        "env_info": "sys.platform: linux",
        "config": "model = dict(type='RetinaNet')",
        "seed": None,
        "epoch": 12,
        "hook_msgs": {},
        "CLASSES": tuple(f"class {i}" for i in range(80)),
    }
    data = {"meta": meta, "state_dict": lively(state)}
    torch.save(data, file, _use_new_zipfile_serialization=False)


def lively(state):
    """With different batch norms, and scores and boxes that vary, so that there are detections."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, value in state.items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value = torch.rand(value.shape, generator=generator) * 0.2 + 0.9
        elif re.search(r"(cls_score|cls_logits|retina_cls)\.bias", name):
            value = torch.randn(value.shape, generator=generator) - 2
        elif re.search(r"(cls_score|cls_logits|retina_cls|bbox_pred|bbox_reg|retina_reg)\.", name):
            value = value / 1000  # the features of random weights are large
        changed[name] = value
    return changed


WRITERS = {
    "torchvision": write_torchvision,
    "detectron2": write_detectron2,
    "detectron": write_detectron,
    "mmdetection": write_mmdetection,
}


@functools.cache
def published(folder, name):
    """(file, its SHA-256, its MD5) with random weights in the layout of a published one."""
    file = Path(folder, name.replace("/", "-"))
    WRITERS[MODELS[name].source](file, name)
    content = file.read_bytes()
    return file, hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("published"))


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of the libraries, and of ours."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "fvcore"))
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "ours"))
    return tmp_path


@pytest.fixture
def publish(folder, caches, monkeypatch):
    """publish(name, server): the table's entry names a file that ``server`` has, or nobody."""

    def put(name, server="http://127.0.0.1:9"):
        file, sha256, md5 = published(folder, name)
        # Detectron2's PathManager remembers the URLs that it has seen.
        url = MODELS[name].url.replace("https:/", f"{server}/{uuid.uuid4().hex}")
        url = re.sub(r"-[0-9a-f]{8}\.pth$", f"-{sha256[:8]}.pth", url)
        url = re.sub(r"_[0-9a-f]{6}\.pkl$", f"_{md5[:6]}.pkl", url)
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], url=url))
        return file

    return put


def put_where_the_library_looks(name, file):
    path = MODELS[name].local_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, path)
    return path


# ---- from the file to detections


def detect(cfg, load):
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    load(model)
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (3, 128, 160), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        found = model([{"image": image}])[0]["instances"]
    return found.pred_boxes.tensor, found.scores, found.pred_classes


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_detections_are_those_of_the_converted_weights(name, publish, tmp_path):
    file = publish(name)
    put_where_the_library_looks(name, file)
    config_file, weights_file = prepare_model(name)

    def load(model):
        checkpointer = Checkpointer(model)
        checkpointer.load(weights_file)
        checkpointer.check_complete()

    found = detect(setup_cfg(config_file), load)

    converted = SOURCES[MODELS[name].source].convert(read_checkpoint(file)["model"])
    (tmp_path / "direct.yaml").write_text(yaml.safe_dump(converted.config))
    cfg = setup_cfg(str(tmp_path / "direct.yaml"))
    expected = detect(cfg, lambda model: model.load_state_dict(converted.state, strict=False))
    assert len(found[0]) >= 50
    for x, y in zip(found, expected):
        assert torch.equal(x, y)
    names = read_checkpoint(weights_file)["class_names"]
    assert len(names) == cfg.MODEL.RETINANET.NUM_CLASSES


@pytest.mark.slow
def test_detections_of_detectron2s_zoo_begin_with_its_own(publish):
    name = "detectron2/retinanet_R_50_FPN_1x"
    file = publish(name)
    put_where_the_library_looks(name, file)
    config_file, weights_file = prepare_model(name)
    found = detect(setup_cfg(config_file), lambda model: Checkpointer(model).load(weights_file))
    theirs = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    state = read_checkpoint(file)["model"]
    expected = detect(theirs, lambda model: model.load_state_dict(state, strict=False))
    number = len(expected[0])
    assert number >= 50
    assert by_score(*(x[:number] for x in found)) == by_score(*expected)


def by_score(boxes, scores, classes):
    """Rows of plain numbers. Detections with equal scores have no order."""
    return sorted(zip(scores.tolist(), classes.tolist(), boxes.tolist()), reverse=True)


@pytest.mark.parametrize("name", [ONE_OF_EACH[0], "detectron2/retinanet_R_50_FPN_1x"])
def test_weights_are_downloaded_once_by_their_library(name, publish, tmp_path):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file = publish(name, f"http://127.0.0.1:{server.server_port}")
        served = tmp_path / "served" / MODELS[name].url.split("/", 3)[3]
        served.parent.mkdir(parents=True)
        served.symlink_to(file)
        first, second = prepare_model(name), prepare_model(name)
        server.shutdown()
    assert first == second and len(requests) == 1
    assert MODELS[name].local_path().read_bytes() == file.read_bytes()


# ---- without a network, and damage


@pytest.mark.parametrize("name", [ONE_OF_EACH[0], ONE_OF_EACH[-1]])
def test_without_a_network_one_line_says_what_to_put_where(name, publish):
    file = publish(name)
    with pytest.raises(ConfigError) as error:
        prepare_model(name)
    message = str(error.value)
    assert message.startswith(f"cannot fetch {name} (") and "\n" not in message
    url, path = message.split("download ")[1].split(" and put it at ")
    assert url == MODELS[name].url
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, path)  # what the line says
    assert all(Path(made).is_file() for made in prepare_model(name))


def test_kept_files_need_no_download_and_are_made_again_when_damaged(publish, log):
    name = "mmdetection/retinanet_r50_fpn_1x_coco"
    original = put_where_the_library_looks(name, publish(name))
    config, weights = map(Path, prepare_model(name))
    # Copied: safetensors maps the file, which is damaged below.
    state = {k: v.clone() for k, v in read_checkpoint(weights)["model"].items()}
    text = config.read_bytes()
    hidden = original.rename(original.with_name("hidden"))
    assert prepare_model(name) == (str(config), str(weights))
    assert not log.text
    with pytest.raises(ConfigError, match="cannot fetch"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        prepare_model(name)
    hidden.rename(original)
    prepare_model(name)
    again = read_checkpoint(weights)["model"]
    assert again.keys() == state.keys() and config.read_bytes() == text
    assert all(torch.equal(value, state[key]) for key, value in again.items())
    assert f"{weights} is damaged: converting it again" in log.text
    config.unlink()
    prepare_model(name)
    assert config.read_bytes() == text


def test_other_code_of_the_conversion_converts_again(publish, tmp_path, monkeypatch):
    name = "mmdetection/retinanet_r50_fpn_1x_coco"
    put_where_the_library_looks(name, publish(name))
    before = prepare_model(name)
    shutil.copytree(conversion.__path__[0], tmp_path / "code")
    (tmp_path / "code" / "source.py").write_text("# changed")
    monkeypatch.setattr(conversion, "__path__", [str(tmp_path / "code")])
    assert prepare_model(name) != before


def test_damaged_download_names_the_file(publish):
    name = "mmdetection/retinanet_r50_fpn_1x_coco"
    path = put_where_the_library_looks(name, publish(name))
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(ConfigError, match="is damaged: its sha256 begins with .* delete it") as e:
        prepare_model(name)
    assert str(path) in str(e.value)


# ---- the table


def test_unwritable_cache_names_its_variable(monkeypatch):
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", "/proc/no")
    with pytest.raises(ConfigError, match="'/proc/no.*set RETINA_PLUGIN_CACHE to"):
        prepare_model("torchvision/retinanet_resnet50_fpn_v2")


def test_unknown_name_raises_with_the_nearest_and_all():
    with pytest.raises(ConfigError) as error:
        prepare_model("torchvision/retinanet_resnet50")
    message = str(error.value)
    assert "did you mean 'torchvision/retinanet_resnet50_fpn'" in message
    assert all(name in message for name in MODELS)


def test_torchvisions_entries_are_its_own():
    for file, weights in (
        ("retinanet_resnet50_fpn", detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1),
        ("retinanet_resnet50_fpn_v2", detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        model = MODELS[f"torchvision/{file}"]
        assert model.url == weights.url
        assert model.ap == weights.meta["_metrics"]["COCO-val2017"]["box_map"]


def test_detectron2s_entries_are_its_own():
    names = [name for name, model in MODELS.items() if model.source == "detectron2"]
    assert len(names) == 3
    for name in names:
        config = f"COCO-Detection/{name.partition('/')[2]}.yaml"
        assert MODELS[name].url == model_zoo.get_checkpoint_url(config)


def test_files_have_the_checksums_that_their_libraries_give_them():
    for name, model in MODELS.items():
        assert name.startswith(f"{model.source}/retinanet_")
        kinds = {"detectron2": "md5", "detectron": None}
        assert (model.checksum or [None])[0] == kinds.get(model.source, "sha256")
    assert MODELS["torchvision/retinanet_resnet50_fpn"].checksum == ("sha256", "eeacb38b")
    assert MODELS["detectron2/retinanet_R_50_FPN_3x"].checksum == ("md5", "5bd44e")
