"""``retina convert``: what it prints and writes, and one line for everything that cannot be."""

import os
import pickle

import cv2
import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open

from retina_plugin.cli import main
from retina_plugin.cli.convert import check_written
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint
from tests.weights import hostile


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ünet.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture
def error(capsys):
    """``error(*argv)`` is the line that the command ends with."""

    def run(*argv):
        with pytest.raises(SystemExit) as end:
            main(["convert", *map(str, argv)])
        line = end.value.code
        assert isinstance(line, str) and line.isprintable() and line.startswith("error: "), line
        return line

    return run


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_printed_and_written(weights, tmp_path, capsys, suffix):
    output = tmp_path / f"out put{suffix}"
    main(["convert", str(weights), "--output", str(output)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Input    {weights}, weights of imagenet"
    assert printed[1] == "Tensors  100"
    assert printed[-3:] == [
        f"Weights  {output}",
        f"Config   {tmp_path / 'out put.yaml'}",
        "Checked  all tensors load into the ResNet of the config's model",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "out put.yaml"]
    state = read_checkpoint(output)["model"]
    theirs = torch.load(weights)
    ours = state["backbone.bottom_up.res5.1.conv2.weight"]
    assert torch.equal(ours, theirs["layer4.1.conv2.weight"])
    if suffix == ".safetensors":
        with safe_open(output, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_unusable_outputs_are_one_line(weights, tmp_path, error):
    (tmp_path / "a.yaml").touch()
    (tmp_path / "folder.pth").mkdir()
    cases = {
        "a.bin": "its name must end with .pth or .safetensors",
        "a": "its name must end with .pth or .safetensors",
        "no/a.pth": "there is no folder",
        "folder.pth": "is a folder",
        "a.pth": "a.yaml is there already: --overwrite replaces it",
    }
    for name, expected in cases.items():
        assert expected in error(weights, "--output", tmp_path / name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "folder.pth"]
    assert "is the input" in error(weights, "--output", weights, "--overwrite")
    os.link(weights, tmp_path / "link.pth")
    assert "is the input" in error(weights, "--output", tmp_path / "link.pth", "--overwrite")


def test_overwrite_replaces_both_files(weights, tmp_path):
    for name in ("a.pth", "a.yaml"):
        (tmp_path / name).write_text("old")
    main(["convert", str(weights), "--output", str(tmp_path / "a.pth"), "--overwrite"])
    assert "old" not in (tmp_path / "a.yaml").read_text()
    assert len(read_checkpoint(tmp_path / "a.pth")["model"]) == 100


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_overwrite_keeps_the_files_if_the_new_ones_do_not_fit(weights, tmp_path, error, suffix):
    for name in (f"a{suffix}", "a.yaml"):
        (tmp_path / name).write_text("good")
    state = torch.load(weights)
    torch.save({k: v for k, v in state.items() if "layer2.0.bn2" not in k}, tmp_path / "in.pth")
    line = error(tmp_path / "in.pth", "--output", tmp_path / f"a{suffix}", "--overwrite")
    assert f"in.pth cannot be converted: a{suffix} does not fit the model of a.yaml: " in line
    assert (tmp_path / f"a{suffix}").read_text() == (tmp_path / "a.yaml").read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 3


def test_folder_without_write_permission_is_one_line(weights, error):
    assert "cannot write /proc/a.pth: " in error(weights, "--output", "/proc/a.pth")


def test_unusable_inputs_are_one_line(weights, tmp_path, error):
    output = tmp_path / "out.pth"
    torch.save({"a.weight": torch.ones(1), "b\n.bias": torch.ones(1)}, tmp_path / "other.pth")
    both = torch.load(weights) | {"bbox_head.retina_cls.weight": torch.ones(1)}
    torch.save(both, tmp_path / "both.pth")
    (tmp_path / "empty.pth").touch()
    line = error(tmp_path / "other.pth", "--output", output)
    assert "it has 2 tensors (a.weight, b .bias, ...), and known are RetinaNets of " in line
    assert "(mmdetection, imagenet): choose with --from" in error(
        tmp_path / "both.pth", "--output", output
    )
    assert "cannot read" in error(tmp_path / "no.pth", "--output", output)
    assert "is empty" in error(tmp_path / "empty.pth", "--output", output)
    assert "these are not the names of detectron: " in error(
        weights, "--output", output, "--from", "detectron"
    )
    line = error(weights, "--output", output, "--from", "detectron3")
    assert "--from: unknown 'detectron3' (did you mean" in line
    assert not output.exists()


@pytest.mark.parametrize("command", ["convert", "predict"])
@pytest.mark.parametrize("call", ["os.system", "eval", "torch storage"])
def test_weights_are_never_run(tiny_cfg, tmp_path, command, call):
    marker = tmp_path / "marker"
    data = {"model": {"a": hostile.calls(marker)[call]}, "class_names": ["a"]}
    pickle_file, zip_file = tmp_path / "a.pkl", tmp_path / "b.pth"
    pickle_file.write_bytes(pickle.dumps(data))
    hostile.torch_zip(zip_file, pickle.dumps(data, protocol=2))
    (tmp_path / "c.yaml").write_text(tiny_cfg.dump())
    image = str(tmp_path / "a.png")
    cv2.imwrite(image, np.zeros((32, 32, 3), np.uint8))
    for path in map(str, (pickle_file, zip_file)):
        words = {
            "convert": [path, "--output", str(tmp_path / "out.pth")],
            "predict": [image, "--config-file", str(tmp_path / "c.yaml"), "--weights", path],
        }
        with pytest.raises(SystemExit) as end:
            main([command, *words[command]])
        line = end.value.code
        assert line.startswith("error: ") and line.isprintable() and " is refused" in line
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "a.png", "b.pth", "c.yaml"]


def test_incomplete_or_broken_weights_leave_no_files(weights, tmp_path, error):
    state = torch.load(weights)
    torch.save({k: v for k, v in state.items() if "layer2.0.bn2" not in k}, tmp_path / "in.pth")
    line = error(tmp_path / "in.pth", "--output", tmp_path / "out.pth")
    assert "in.pth cannot be converted: " in line and "res3.0.conv2.norm" in line
    torch.save({**state, "bn1.bias": torch.full((64,), float("nan"))}, tmp_path / "in.pth")
    line = error(tmp_path / "in.pth", "--output", tmp_path / "out.pth")
    assert "in.pth is not usable: 1 of its" in line and "bn1.bias" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_check_finds_what_does_not_fit(weights, tmp_path):
    main(["convert", str(weights), "--output", str(tmp_path / "a.pth")])
    state = read_checkpoint(tmp_path / "a.pth")["model"]
    for change in ("missing", "unused"):
        changed = dict(state)
        if change == "missing":
            del changed["backbone.bottom_up.res2.0.conv1.weight"]
        else:
            changed["backbone.bottom_up.other"] = torch.ones(1)
        torch.save({"model": changed}, tmp_path / "a.pth")
        with pytest.raises(ConfigError, match="does not fit the model of"):
            check_written(tmp_path / "a.pth", tmp_path / "a.yaml")


def test_foreign_retinanet_as_weights_asks_for_convert(tiny_cfg, tmp_path):
    from retina_plugin.engine import Trainer

    torch.save({"state_dict": {"bbox_head.retina_cls.weight": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"mmdetection's RetinaNet.*run `retina convert"):
        Checkpointer(Trainer.build_model(tiny_cfg)).load(str(tmp_path / "a.pth"))


def test_checkpoint_of_a_training_keeps_its_config_but_no_imports(tiny_cfg, tmp_path, capsys):
    """What a file of weights names is not imported."""
    from retina_plugin.engine import Trainer

    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    tiny_cfg.IMPORTS = (str(tmp_path / "evil.py"),)
    model = Trainer.build_model(tiny_cfg)
    saver = Checkpointer(model, str(tmp_path))
    saver.class_names = list("0123456789")
    (tmp_path / "base.yaml").write_text(f"IMPORTS: ['{tmp_path / 'evil.py'}']")
    text = f"_BASE_: {tmp_path / 'base.yaml'}\n{tiny_cfg.dump()}"
    saver.save("model_final", resume={"config": text})
    main(
        ["convert", str(tmp_path / "model_final.pth"), "--output", str(tmp_path / "a.safetensors")]
    )
    printed = capsys.readouterr().out
    assert "Classes  10 (0, 1, 2, ...)" in printed and "IMPORTS are left out" in printed
    cfg = setup_cfg(str(tmp_path / "a.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == tiny_cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert cfg.MODEL.WEIGHTS == str(tmp_path / "a.safetensors") and not cfg.IMPORTS
    assert read_checkpoint(tmp_path / "a.safetensors")["class_names"] == list("0123456789")
