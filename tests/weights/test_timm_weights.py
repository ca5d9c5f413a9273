"""``MODEL.WEIGHTS: timm://NAME``: fetched by timm from its own cache, kept, checked, loaded."""

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import load_file, save_file

from retina_plugin.doctor import check_weights
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint
from retina_plugin.weights.timm_weights import timm_weights

timm = pytest.importorskip("timm")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name): puts timm's file of a model with random weights into an empty cache of the hub.

    Its layout is that of huggingface_hub, which timm fetches with: the library's own look-up runs.
    There is no network.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "ours"))

    def put(name):
        torch.manual_seed(1)
        model = timm.create_model(name)
        for key, value in model.state_dict().items():
            if "running" in key:
                value.copy_(torch.rand_like(value) + 0.5)
        folder = tmp_path / "hub" / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        save_file(model.state_dict(), snapshot / "model.safetensors")
        return model

    return put


def use_timm(cfg, name, weights):
    cfg.MODEL.BACKBONE.NAME = "build_timm_retina_fpn_backbone"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.WEIGHTS = name, weights
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    return cfg


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_detector_has_timms_weights_and_features(tiny_cfg, hub, norm):
    theirs = hub("resnet18.a1_in1k").eval()
    cfg = use_timm(tiny_cfg, "resnet18", "timm://resnet18.a1_in1k")
    cfg.MODEL.TIMM.NORM = norm
    assert not list(check_weights(cfg, read=True))
    model = build_model(cfg).eval()
    checkpointer = Checkpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert not any("bottom_up" in name for name in checkpointer.fit.missing)
    assert not checkpointer.fit.unused and not checkpointer.fit.other_shape
    image = torch.randn(1, 3, 64, 96)
    expected = theirs.forward_intermediates(image, intermediates_only=True)[-3:]
    for x, y in zip(model.backbone.bottom_up(image).values(), expected):
        torch.testing.assert_close(x, y)


def test_the_preferred_weights_are_those_of_a_name_without_a_tag(hub):
    hub("resnet18.a1_in1k")
    assert timm_weights("resnet18") == timm_weights("resnet18.a1_in1k")


def test_kept_weights_need_no_network_and_are_made_again_when_damaged(hub, tmp_path, log):
    hub("mobilenetv3_small_050.lamb_in1k")
    file = timm_weights("mobilenetv3_small_050.lamb_in1k")
    content = file.read_bytes()
    hidden = (tmp_path / "hub").rename(tmp_path / "hidden")
    assert timm_weights("mobilenetv3_small_050.lamb_in1k").read_bytes() == content
    hidden.rename(tmp_path / "hub")
    file.write_bytes(content[:-4] + b"oops")
    assert timm_weights("mobilenetv3_small_050.lamb_in1k").read_bytes() == content
    assert "is damaged: making it again" in log.text


def test_checkpoints_of_the_detector_are_loaded_completely(tiny_cfg, tmp_path):
    cfg = use_timm(tiny_cfg, "convnext_atto", "")
    model = build_model(cfg)
    Checkpointer(model, str(tmp_path)).save("model_final")
    other = build_model(cfg)
    checkpointer = Checkpointer(other)
    checkpointer.load(str(tmp_path / "model_final.pth"))
    checkpointer.check_complete()
    for x, y in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(x, y)


def test_a_file_of_the_features_is_read_as_any_weights(hub):
    hub("resnet18.a1_in1k")
    file = timm_weights("resnet18.a1_in1k")
    state = read_checkpoint(file)["model"]
    assert state.keys() == load_file(file).keys()
    assert all(name.startswith("backbone.bottom_up.features.") for name in state)
    assert not any("fc." in name or "tracked" in name for name in state)


def test_without_a_network_one_line_says_what_to_fetch(tiny_cfg, hub):
    with pytest.raises(ConfigError) as error:
        timm_weights("resnet18.tv_in1k")
    message = str(error.value)
    assert "https://huggingface.co/timm/resnet18.tv_in1k" in message and "\n" not in message
    assert "timm.create_model('resnet18.tv_in1k', pretrained=True)" in message
    (finding,) = check_weights(use_timm(tiny_cfg, "resnet18", "timm://resnet18.tv_in1k"))
    assert finding.where == "MODEL.WEIGHTS" and "timm cannot fetch" in str(finding)


def test_unknown_weights_raise_with_the_nearest(hub):
    with pytest.raises(ConfigError, match="'resnet18.tv' .did you mean 'resnet18.tv_in1k'"):
        timm_weights("resnet18.tv")
    with pytest.raises(ConfigError, match="timm has no weights of 'darknet17'"):
        timm_weights("darknet17")


def findings(cfg):
    return [str(finding) for finding in check_weights(cfg)]


def test_pixels_must_be_those_of_the_weights(tiny_cfg, hub):
    hub("resnet18.a1_in1k")
    cfg = use_timm(tiny_cfg, "resnet18", "timm://resnet18.a1_in1k")
    cfg.INPUT.FORMAT = "BGR"
    (message,) = findings(cfg)
    assert message.startswith("INPUT.FORMAT: is BGR, but timm://resnet18.a1_in1k was trained with")
    assert message.endswith(
        "set INPUT.FORMAT: RGB, MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53], "
        "MODEL.PIXEL_STD: [58.395, 57.12, 57.375]"
    )
    cfg.INPUT.FORMAT = "RGB"
    assert not findings(cfg)
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    (message,) = findings(cfg)
    assert message.startswith("MODEL.PIXEL_STD: is [1.0, 1.0, 1.0], but")


def test_weights_of_another_backbone_are_refused(tiny_cfg, hub):
    cfg = use_timm(tiny_cfg, "resnet34", "timm://resnet18.a1_in1k")
    assert "set MODEL.TIMM.NAME resnet18" in findings(cfg)[0]
    cfg.MODEL.BACKBONE.NAME = "build_retina_fpn_backbone"
    assert "set MODEL.BACKBONE.NAME build_timm_retina_fpn_backbone" in findings(cfg)[0]
