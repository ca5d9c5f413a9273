"""Checkpoints: written whole, damaged ones are found, and only what fits is taken."""

import errno
import logging
import os
import pickle
import resource
import signal

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from torch import nn

from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint
from tests.weights import hostile


class Head(nn.Module):
    """Two layers that are named like the detector's; ``anchors`` anchors a location."""

    def __init__(self, classes=4, anchors=3):
        super().__init__()
        self.cls_score = nn.Conv2d(2, anchors * classes, 1)
        self.bbox_pred = nn.Conv2d(2, anchors * 4, 1)


class Model(nn.Module):
    def __init__(self, classes=4, anchors=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.head = Head(classes, anchors)


@pytest.fixture
def save(tmp_path):
    """``save(iteration, ...)`` writes a checkpoint whose first bias is the iteration."""

    def save_checkpoint(*iterations, name="", **kwargs):
        for iteration in iterations:
            model = Model()
            nn.init.constant_(model.backbone[0].bias, iteration)
            saver = Checkpointer(model, str(tmp_path))
            saver.save(name or f"model_{iteration:07d}", iteration=iteration, **kwargs)

    return save_checkpoint


@pytest.fixture
def found(tmp_path, log):
    """``found()`` is the checkpoint that is taken, and the warnings."""

    def find():
        log.clear()
        path = Checkpointer(Model(), str(tmp_path)).get_checkpoint_file()
        text = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        assert all(line.isprintable() for line in text)
        return os.path.relpath(path, tmp_path) if path else "", text

    return find


def one_line(function, *args, kind=ConfigError):
    with pytest.raises(kind) as raised:
        function(*args)
    text = str(raised.value)
    assert text.isprintable(), text
    return text


# Writing --------------------------------------------------------------------------------------


def test_a_checkpoint_is_detectron2s(tmp_path, save):
    """Its checkpointer reads ours, and ours reads its."""
    save(7)
    model = Model()
    loaded = DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert loaded["iteration"] == 7 and model.backbone[0].bias.tolist() == [7, 7]
    DetectionCheckpointer(model, str(tmp_path)).save("model_0000009", iteration=9)
    ours = Model()
    assert Checkpointer(ours, str(tmp_path)).resume_or_load("")["iteration"] == 9
    assert ours.backbone[0].bias.tolist() == [7, 7]


def test_checkpointables_and_extras_are_kept(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.25, momentum=0.9)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000001", note="ü")
    other = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    saver = Checkpointer(model, str(tmp_path), optimizer=other)
    assert saver.resume_or_load("", resume=True) == {"note": "ü"}
    assert other.param_groups[0]["lr"] == 0.25


def test_untagged_save_is_not_resumed(tmp_path, save, found):
    save(1)
    save(2, name="model_best", tag=False)
    assert found() == ("model_0000001.pth", [])
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_same_training_writes_the_same_bytes(tmp_path, save):
    """Neither a date nor a temporary name is in the file."""
    torch.manual_seed(0)
    save(3)
    first = (tmp_path / "model_0000003.pth").read_bytes()
    torch.manual_seed(0)
    save(3)
    assert (tmp_path / "model_0000003.pth").read_bytes() == first


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpointer(Model()).save("a")
    Checkpointer(Model(), "there", save_to_disk=False).save("a")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line_and_keeps_the_old_files(tmp_path, save, found):
    """The limit on a file's size stands for the disk. No torn file stays."""
    save(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        for name in ("model_0000002", "model_0000001"):
            text = one_line(lambda: save(1, name=name), kind=OSError)  # noqa: B023
            assert text == f"cannot write {tmp_path / name}.pth: {os.strerror(errno.EFBIG)}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert found() == ("model_0000001.pth", [])


def test_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    saver = Checkpointer(Model(), str(tmp_path / "file"))
    text = one_line(saver.save, "a", kind=OSError)
    assert text.startswith(f"cannot write {tmp_path / 'file' / 'a.pth'}: ")
    text = one_line(saver.tag_last_checkpoint, "a.pth", kind=OSError)
    assert str(tmp_path / "file" / "last_checkpoint") in text


class Kills:
    """Being pickled, it ends the process: a checkpoint is half written then."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(folder, step, number):
    """Kill this process at the given call of a step of writing."""
    saver = Checkpointer(nn.Linear(1, 1), str(folder))
    saver.save("model_0000001", iteration=1)
    if step == "write":
        saver.save("model_0000001", iteration=2, last=Kills())
    name = {"flush": "fsync", "rename": "replace"}[step]
    original, calls = getattr(os, name), []

    def kill(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, kill)
    saver.save("model_0000001", iteration=2)
    saver.save("model_0000003", iteration=3)


@pytest.mark.parametrize(
    ("step", "call", "iteration"),
    [("write", 1, 1), ("flush", 1, 1), ("rename", 1, 1), ("rename", 2, 2), ("rename", 4, 2)],
)
def test_killed_at_any_step_leaves_a_whole_checkpoint(tmp_path, step, call, iteration):
    """The old one or the new one, and the next save removes the temporary one."""
    process = os.fork()
    if process == 0:
        try:
            save_until_killed(tmp_path, step, call)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    saver = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    assert read_checkpoint(saver.get_checkpoint_file())["iteration"] == iteration
    saver.save("model_0000009")
    assert not list(tmp_path.glob(".*"))


# Finding --------------------------------------------------------------------------------------


def damage(path, how):
    whole = path.read_bytes()
    marker = path.parent / "marker"
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "hostile":
        torch.save({"model": hostile.calls(marker)["os.system"]}, path)
    elif how == "hostile pickle":
        path.write_bytes(pickle.dumps(hostile.calls(marker)["eval"]))
    elif how == "not finite":
        torch.save({"model": {"a": torch.tensor([1, float("nan")])}}, path)
    else:
        contents = {
            "half": whole[: len(whole) // 2],
            "bit": whole.replace(b"FloatStorage", b"FloatStorbge", 1),
            "empty": b"",
            "text": b"hello\n",
            "web page": b"<html>",
            "zeros": bytes(len(whole)),
        }
        path.write_bytes(contents[how])


DAMAGE = "missing folder hostile half bit empty text zeros".split() + [
    *("web page", "not finite", "hostile pickle"),
]


@pytest.mark.parametrize("how", DAMAGE)
def test_newest_whole_checkpoint_is_taken(tmp_path, save, found, how):
    """A warning names the broken one. Nothing of it is run."""
    save(4, 9, 14)
    save(99, name="model_best", tag=False)
    damage(tmp_path / "model_0000014.pth", how)
    path, warnings = found()
    assert path == "model_0000009.pth"
    assert len(warnings) == 2 and "model_0000014.pth" in warnings[0] and path in warnings[1]
    damage(tmp_path / "model_0000009.pth", "empty")
    path, warnings = found()
    assert path == "model_0000004.pth" and len(warnings) == 3
    damage(tmp_path / "model_0000004.pth", how)
    path, warnings = found()
    assert path == "" and "no whole checkpoint" in warnings[-1]
    assert not (tmp_path / "marker").exists()


def test_later_checkpoints_than_the_damaged_one_are_not_taken(tmp_path, save, found):
    """They are those of an older, longer run."""
    save(19, 4, 9)
    damage(tmp_path / "model_0000009.pth", "half")
    assert found()[0] == "model_0000004.pth"


def test_final_checkpoint_counts_by_its_iteration(tmp_path, save, found):
    save(4, 9)
    save(7, name="model_final")
    damage(tmp_path / "model_final.pth", "half")
    assert found()[0] == "model_0000009.pth"
    save(12, name="model_final", tag=False)
    save(14)
    damage(tmp_path / "model_0000014.pth", "half")
    assert found()[0] == "model_final.pth"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\0",
        b"\xff\xfe",
        b"none.pth",
        b"../other.pth",
        b"/etc/hostname",
        b"..",
        b".",
        b"sub/model_0000004.pth",
        b"model_0000009.pth\nmodel_0000004.pth",
        b"last_checkpoint",
        b"text.txt",
        b"evil.pkl",
        b"x" * 10_000,
    ],
)
def test_broken_last_checkpoint_is_named(tmp_path, save, found, content):
    """It is no path out of the folder, either."""
    torch.save({"model": Model().state_dict()}, tmp_path.parent / "other.pth")
    save(4, 9)
    (tmp_path / "text.txt").write_text("text")
    marker = tmp_path / "marker"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(hostile.calls(marker)["os.system"]))
    (tmp_path / "last_checkpoint").write_bytes(content)
    path, warnings = found()
    assert path == "model_0000009.pth" and len(warnings) == 2
    assert not marker.exists()


def test_newline_after_the_name_is_no_fault(tmp_path, save, found):
    save(4, 9)
    (tmp_path / "last_checkpoint").write_bytes(b" model_0000004.pth\r\n")
    assert found() == ("model_0000004.pth", [])


def test_missing_last_checkpoint(tmp_path, save, found):
    """The newest one is taken, with a warning. A new folder gives none."""
    assert found() == ("", []) and not Checkpointer(Model(), str(tmp_path)).has_checkpoint()
    save(4, 9)
    (tmp_path / "last_checkpoint").unlink()
    path, warnings = found()
    assert path == "model_0000009.pth" and "last_checkpoint is missing" in warnings[0]
    assert Checkpointer(Model(), str(tmp_path)).has_checkpoint()


def test_resume_falls_back_to_the_weights(tmp_path, save, log):
    """If there is no whole checkpoint; a warning says so."""
    save(4)
    other = tmp_path / "other.pth"
    torch.save({"model": Model().state_dict(), "iteration": 77}, other)
    damage(tmp_path / "model_0000004.pth", "half")
    saver = Checkpointer(Model(), str(tmp_path))
    saver.resume_or_load(str(other), resume=True)
    assert saver.loaded_from == str(other) and "no whole checkpoint" in log.text


# Loading --------------------------------------------------------------------------------------


def lines(log):
    """What the console shows of loading."""
    shown = (r for r in log.records if r.levelno > logging.INFO or r.name == "retina_plugin")
    return [record.getMessage() for record in shown]


def load(tmp_path, state, model=None, name="a.pth", query=""):
    """A checkpointer that has loaded ``state``."""
    torch.save(state, tmp_path / name)
    saver = Checkpointer(model or Model())
    saver.load(str(tmp_path / name) + query)
    return saver


PREFIXED = {
    "none": lambda k: k,
    "module": lambda k: f"module.{k}",
    "Lightning": lambda k: f"model.{k}",
    "both": lambda k: f"module.model.{k}",
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled part": lambda k: k.replace("backbone.", "backbone._orig_mod."),
    "all": lambda k: f"model.module._orig_mod.{k}",
}


@pytest.mark.parametrize("kind", ["torch", "safetensors", "pickle"])
@pytest.mark.parametrize("rename", PREFIXED.values(), ids=PREFIXED.keys())
def test_prefixes_are_taken_off(tmp_path, log, rename, kind):
    """In every format; nothing is reported."""
    source, target = Model(), Model()
    state = {rename(k): v.contiguous() for k, v in source.state_dict().items()}
    path = tmp_path / "a.pth"
    if kind == "torch":
        torch.save({"state_dict": state}, path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    saver = Checkpointer(target)
    saver.load(str(path))
    saver.check_complete()
    assert not [line for line in lines(log) if "Loaded" in line]
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_names_of_the_model_that_begin_like_a_prefix_stay(tmp_path):
    """A user's model may have a part that is called "model"."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()

    source = Wrapped()
    load(tmp_path, source.state_dict(), Wrapped()).check_complete()
    load(tmp_path, source.model.state_dict(), Model()).check_complete()


def test_half_precision_and_foreign_entries(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in Model().state_dict().items()}
    model = Model()
    load(tmp_path, {"model": state, "epoch": 3}, model).check_complete()
    assert model.head.cls_score.weight.dtype == torch.float32
    assert torch.equal(model.head.cls_score.weight, state["head.cls_score.weight"].float())


def test_what_was_not_loaded_is_one_line(tmp_path, log):
    """Numbers and an example of each kind; the names are in the log file."""
    state = Model(classes=5).state_dict() | {"extra.a": torch.ones(1), "extra.b": torch.ones(1)}
    del state["backbone.0.bias"]
    saver = load(tmp_path, state)
    (line,) = lines(log)
    assert line == (
        f"Loaded      7 of 10 tensors from {tmp_path / 'a.pth'}; not in it: 1, e.g. "
        "backbone.0.bias; of another shape: 2, e.g. head.cls_score.weight (15, 2, 1, 1) for "
        "(12, 2, 1, 1); not used: 2, e.g. extra.a"
    )
    assert [r.levelname for r in log.records if "Loaded" in r.getMessage()] == ["WARNING"]
    assert saver.fit.loaded == 7
    for name in ("extra.{a, b}", "head.cls_score.bias", "backbone.0.bias"):
        assert any(name in r.getMessage() and r.levelname == "INFO" for r in log.records), name


def test_matching_heuristics(tmp_path, log):
    """By the URL's query, as in Detectron2: names match by their endings."""
    state = {k.removeprefix("backbone."): v for k, v in Model().backbone.state_dict().items()}
    model = Model()
    load(tmp_path, state, model, query="?matching_heuristics=True")
    assert torch.equal(model.backbone[0].weight, state["0.weight"])
    assert "not in it: 4" in lines(log)[-1]
    assert "nothing of it" in one_line(load, tmp_path, state)
    assert "unknown 'a'" in one_line(load, tmp_path, state, None, "a.pth", "?a=b")


def test_caffe2_backbone_is_detectron2s(tmp_path, tiny_cfg, log):
    """The same tensors as by Detectron2's checkpointer, and one quiet line."""
    from retina_plugin.engine import Trainer

    blobs = {"fc1000_w": np.ones((3, 2), "f4"), "res2_0_branch2a_bn_s_momentum": np.ones(1)}
    for key, value in Trainer.build_model(tiny_cfg).backbone.bottom_up.state_dict().items():
        key = key.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
        for old, new in (
            *((".shortcut", "_branch1"), (".conv1", "_branch2a"), (".conv2", "_branch2b")),
            *((".norm.", "_bn."), (".weight", "_w"), (".bias", "_b"), (".running_mean", "_rm")),
            *((".running_var", "_riv"), ("_bn_w", "_bn_s"), (".", "_")),
        ):
            key = key.replace(old, new)
        if value.is_floating_point():
            blobs[key] = value.numpy() + 1
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    states = []
    for kind in (DetectionCheckpointer, Checkpointer):
        torch.manual_seed(0)
        model = Trainer.build_model(tiny_cfg)
        log.clear()
        kind(model).load(str(path))
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
    assert torch.equal(
        states[1]["backbone.bottom_up.stem.conv1.weight"], torch.tensor(blobs["conv1_w"])
    )
    (line,) = lines(log)
    assert "not used: 1, e.g. fc1000" in line and line.startswith("Loaded ")
    assert not [r for r in log.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"a.weight": torch.ones(2)}, "nothing of it can be loaded, e.g. it has 'a.weight'"),
        (
            {"backbone.0.weight": torch.ones(3), "x": torch.ones(1)},
            "backbone.0.weight has the shape (3,) there and (2, 3, 1, 1)",
        ),
    ],
)
def test_weights_of_which_nothing_fits_raise(tmp_path, state, expected):
    """In a training too: it would start from random weights without a word."""
    assert expected in one_line(load, tmp_path, state)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_raise(tmp_path, number):
    state = Model().state_dict()
    state["head.cls_score.bias"][3] = number
    text = one_line(load, tmp_path, state)
    assert "1 of its 11 tensors" in text and "the first is head.cls_score.bias" in text


def check(tmp_path, state, model=None):
    load(tmp_path, state, model).check_complete()


def test_evaluation_needs_every_tensor(tmp_path):
    """Of the file and of the right shape; but not batch norm's counter."""
    whole = Model().state_dict()
    check(tmp_path, {k: v for k, v in whole.items() if "num_batches" not in k})
    check(tmp_path, whole | {"more": torch.ones(1)})
    for key in whole.keys() - {"backbone.1.num_batches_tracked"}:
        without = {k: v for k, v in whole.items() if k != key}
        assert f"lacks 1 of 10 tensors, e.g. {key}" in one_line(check, tmp_path, without)
    other = whole | {"backbone.0.bias": torch.ones(5)}
    assert "backbone.0.bias has the shape (5,)" in one_line(check, tmp_path, other)
    empty = Checkpointer(Model(), str(tmp_path))
    empty.resume_or_load("")
    assert "there are no weights to evaluate" in one_line(empty.check_complete)


def test_head_of_other_classes_names_both_numbers(tmp_path):
    """Anchors and classes multiply to the channels, so other anchors are not taken for classes."""
    text = one_line(check, tmp_path, Model(classes=80).state_dict())
    assert (
        "a head of 80 classes (head.cls_score.weight), but MODEL.RETINANET.NUM_CLASSES is 4" in text
    )
    text = one_line(check, tmp_path, Model(anchors=9).state_dict())
    assert (
        "NUM_CLASSES" not in text and "has the shape (36, 2, 1, 1) there and (12, 2, 1, 1)" in text
    )


@pytest.mark.parametrize(
    "name", ["Run:1.pth", "model.pth?download=true", "Exp:1/a.pth", "what?/a.pth", "a#b;c%20?.pth"]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_file_of_any_name_is_loaded(tmp_path, monkeypatch, name, absolute):
    """With a "?" after it too. A file with the name before its own "?" is another one."""
    monkeypatch.chdir(tmp_path)
    path = os.path.join(tmp_path, name) if absolute else name
    torch.save({}, "model.pth")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    state = Model().state_dict()
    torch.save(state, path)
    for query in ("", "?matching_heuristics=True"):
        saver = Checkpointer(Model())
        saver.load(path + query)
        saver.check_complete()
        assert torch.equal(saver.model.head.cls_score.weight, state["head.cls_score.weight"])
    assert "unknown 'a'" in one_line(saver.load, f"{path}?a=b")


@pytest.mark.parametrize("folder", ["Exp:1", "what?"])
def test_folder_of_any_name_is_resumed(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    os.mkdir(folder)
    Checkpointer(Model(), folder).save("model_0000003", iteration=3)
    assert Checkpointer(Model(), folder).resume_or_load("")["iteration"] == 3


def test_missing_file_is_one_line(tmp_path):
    assert "no.pth" in one_line(Checkpointer(Model()).load, str(tmp_path / "no.pth"))
    assert "No:1.pth" in one_line(Checkpointer(Model()).load, "No:1.pth")


def test_a_failed_load_does_not_hinder_the_next(tmp_path):
    (tmp_path / "bad.pth").write_text("bad")
    saver = Checkpointer(Model())
    one_line(saver.load, str(tmp_path / "bad.pth"))
    torch.save(Model().state_dict(), tmp_path / "a.pth")
    saver.load(str(tmp_path / "a.pth"))
    saver.check_complete()
