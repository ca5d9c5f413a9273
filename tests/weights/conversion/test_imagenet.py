"""ImageNet backbones: the converted ResNet computes what torchvision's computes."""

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer
from retina_plugin.weights.conversion import convert_file, find_source
from retina_plugin.weights.conversion.imagenet import SOURCE

NETS = ["resnet18", "resnet50", "resnext50_32x4d"]


def random_resnet(name):
    """With statistics of batch norm that are not those of an untrained net."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.3, 0.6)
    return net


def their_features(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    features = {}
    for stage in range(1, 5):
        features[f"res{stage + 1}"] = x = getattr(net, f"layer{stage}")(x)
    return features


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "as MODEL.WEIGHTS"])
@pytest.mark.parametrize("name", [*NETS[:2], pytest.param(NETS[2], marks=pytest.mark.slow)])
def test_features_are_torchvisions(tmp_path, log, name, converted):
    """To the bit, from a converted file and from the state dict itself."""
    net = random_resnet(name)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    convert_file(tmp_path / "net.pth", tmp_path / "backbone.pth")
    cfg = setup_cfg(str(tmp_path / "backbone.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    path = cfg.MODEL.WEIGHTS if converted else tmp_path / "net.pth"
    Checkpointer(model).load(str(path))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = their_features(net, x)
        for stage, ours in model.backbone.bottom_up(x).items():
            assert torch.equal(ours, theirs[stage]), stage
    assert not [r for r in log.records if r.levelname == "WARNING"]


def test_config_has_the_pixels_of_the_weights():
    for name in NETS:
        config = SOURCE.convert(getattr(torchvision.models, name)().state_dict()).config
        assert config["INPUT"]["FORMAT"] == "RGB"
        assert config["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
        assert config["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
        assert config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False
    assert config["MODEL"]["RESNETS"]["NUM_GROUPS"] == 32
    assert config["MODEL"]["RESNETS"]["WIDTH_PER_GROUP"] == 4


def msra_blobs(net):
    """AffineChannel blobs of a net: batch norm without statistics."""
    names = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    names |= {"bn1": "branch2a_bn", "bn2": "branch2b_bn", "bn3": "branch2c_bn"}
    names |= {"downsample.0": "branch1", "downsample.1": "branch1_bn"}
    blobs = {}
    for key, value in net.state_dict().items():
        layer, parameter = key.rsplit(".", 1)
        suffix = {"weight": "s" if value.dim() == 1 else "w", "bias": "b"}.get(parameter)
        if suffix is None or layer == "fc":
            continue
        if layer.startswith("layer"):
            stage, block, part = layer.removeprefix("layer").split(".", 2)
            layer = f"res{int(stage) + 1}_{block}_{names[part]}"
        else:
            layer = {"conv1": "conv1", "bn1": "res_conv1_bn"}[layer]
        blobs[f"{layer}_{suffix}"] = value
    return blobs


def test_msra_is_an_affine_map_to_the_last_bits(tmp_path):
    """Detectron2's own loader is 5e-6 off a layer: its eps is added to a variance of 1."""
    net = random_resnet("resnet50")
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    blobs = msra_blobs(net) | {"conv1_b": torch.zeros(64), "fc1000_w": torch.zeros(10, 2048)}
    assert find_source(blobs) is SOURCE
    converted = SOURCE.convert(blobs)
    model_config = converted.config["MODEL"]
    assert model_config["PIXEL_STD"] == [1, 1, 1] and model_config["RESNETS"]["STRIDE_IN_1X1"]
    assert "Left out: conv1_b, fc1000_w." in converted.notes
    ours = {k: v for k, v in converted.state.items() if "running" not in k}
    expected = SOURCE.convert(net.state_dict()).state
    for name, value in ours.items():
        assert torch.equal(value, expected[name])
    for name, value in converted.state.items():
        if name.endswith("running_var"):
            np.testing.assert_allclose((value + 1e-5).numpy(), 1, atol=1e-7)
    assert converted.state.keys() == expected.keys()


def test_contradicting_pixels_are_one_warning(tmp_path, log):
    """torchvision's weights in a config for MSRA's: the most common mistake."""
    torch.save(random_resnet("resnet50").state_dict(), tmp_path / "net.pth")
    cfg = setup_cfg("retina_R50_800.yaml", ["MODEL.DEVICE", "cpu"])
    Checkpointer(build_model(cfg)).load(str(tmp_path / "net.pth"))
    (line,) = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    for part in ("PIXEL_MEAN", "PIXEL_STD", "FORMAT RGB", "STRIDE_IN_1X1 False"):
        assert part in line


def test_other_resnets_are_refused():
    state = random_resnet("resnet18").state_dict()
    with pytest.raises(ConfigError, match=r"'layer1.0.se.weight' is not a part of a ResNet"):
        SOURCE.convert(state | {"layer1.0.se.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="known are ResNet-18"):
        SOURCE.convert({k: v for k, v in state.items() if not k.startswith("layer3.1")})
