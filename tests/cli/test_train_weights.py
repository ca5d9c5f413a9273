"""Weights and checkpoints on the way through the command: safe, and refused where they lie."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from retina_plugin.cli import train as train_command
from retina_plugin.engine import Trainer
from retina_plugin.weights import Checkpointer
from tests.weights import hostile


@pytest.fixture
def out(tiny_cfg):
    return Path(tiny_cfg.OUTPUT_DIR)


@pytest.fixture
def run(tiny_cfg, tmp_path, monkeypatch):
    """``run(*args)`` runs the command with the tiny config."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return lambda *args: train_command.main(["--config-file", str(path), *args])


@pytest.fixture
def error(run):
    """``error(*args)`` is the line that the command ends with, after "error: "."""

    def run_and_fail(*args):
        with pytest.raises(SystemExit) as end:
            run(*args)
        line = end.value.code
        assert isinstance(line, str) and line.startswith("error: ") and line.isprintable()
        return line.removeprefix("error: ")

    return run_and_fail


@pytest.fixture
def weights(tiny_cfg, tmp_path):
    """``weights(change)`` saves a model's weights after ``change(state)``; returns the path."""

    def save(change=lambda state: None):
        torch.manual_seed(0)
        state = Trainer.build_model(tiny_cfg).state_dict()
        change(state)
        torch.save({"model": state}, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return save


MODES = {
    "train": [],
    "evaluate": ["--eval-only"],
    "resume": ["--resume"],
    "evaluate last": ["--eval-only", "--resume"],
}


def old(data, path):
    torch.save(data, path, _use_new_zipfile_serialization=False)


def dump(data, path):
    Path(path).write_bytes(pickle.dumps(data))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize(
    ("name", "save"),
    [("a.pkl", dump), ("a.pth", dump), ("a.pth", torch.save), ("a.ckpt", old), ("a.pyth", old)],
)
def test_weights_are_never_run(error, out, tmp_path, name, save, mode):
    """``MODEL.WEIGHTS`` and ``last_checkpoint``, to train and to evaluate."""
    marker = tmp_path / "marker"
    call = hostile.calls(marker)["os.system"]
    if "--resume" in mode:
        out.mkdir(parents=True)
        save({"model": {"a": call}, "iteration": 1}, out / name)
        (out / "last_checkpoint").write_text(name)
    save({"model": {"a": call}, "__author__": "x"}, tmp_path / name)
    line = error(*mode, "MODEL.WEIGHTS", str(tmp_path / name))
    assert f"{name} is refused" in line and "posix.system" in line
    assert not marker.exists()


def renamed(state):
    for key in list(state):
        state[f"other.{key}"] = state.pop(key)


def more_classes(state):
    for key in ("head.cls_score.weight", "head.cls_score.bias"):
        state[key] = torch.cat([state[key]] * 8)


def other_width(state):
    state["backbone.fpn_output3.weight"] = torch.ones(3, 3, 3, 3)


def not_finite(state):
    state["backbone.fpn_output3.weight"][0, 0, 0, 0] = float("nan")


UNFIT = {
    "nothing": (renamed, "nothing of it can be loaded"),
    "classes": (more_classes, "has a head of 80 classes (head.cls_score.weight), but MODEL."),
    "shape": (other_width, "backbone.fpn_output3.weight has the shape (3, 3, 3, 3) there"),
    "missing": (lambda state: state.pop("head.bbox_pred.bias"), "lacks 1 of"),
    "not finite": (not_finite, "the first is backbone.fpn_output3.weight"),
    "backbone": (
        lambda state: [state.pop(k) for k in list(state) if "bottom_up" not in k],
        "e.g. backbone.fpn_",
    ),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", UNFIT)
def test_evaluation_of_unfit_weights_is_one_line(error, out, weights, kind, resume):
    """There is no AP of weights that were not all loaded."""
    change, expected = UNFIT[kind]
    path = weights(change)
    if resume and kind != "not finite":  # such a checkpoint is passed over: see below
        out.mkdir(parents=True)
        shutil.copy(path, out / "model_0000001.pth")
        (out / "last_checkpoint").write_text("model_0000001.pth")
        line = error("--eval-only", "--resume")
    else:
        line = error("--eval-only", "MODEL.WEIGHTS", path)
    assert expected in line and ".pth " in line
    assert not (out / "inference").exists()


@pytest.mark.parametrize("kind", ["nothing", "not finite", "classes", "backbone"])
def test_training_from_unfit_weights(run, error, out, weights, capsys, kind):
    """Fine-tuning says in one line what was not loaded. Nothing, or not finite, is an error."""
    change, expected = UNFIT[kind]
    args = ["MODEL.WEIGHTS", weights(change), "SOLVER.MAX_ITER", "1"]
    if kind in ("nothing", "not finite"):
        assert expected in error(*args)
        assert not list(out.glob("*.pth"))
        return
    run(*args)
    printed = capsys.readouterr().out.splitlines()
    said = "80 classes without known names are not used" if kind == "classes" else "tensors from"
    assert sum(said in line for line in printed) == 1
    assert not any(
        "Skip loading" in line or "not found in the checkpoint" in line for line in printed
    )
    log = (out / "log.txt").read_text()
    assert said in log and (kind == "classes" or "not found in the checkpoint" in log)
    assert (out / "model_final.pth").is_file()


def test_evaluation_takes_the_newest_whole_checkpoint(run, error, out, weights, capsys, tiny_cfg):
    """Damaged ones and those that are not finite are named and passed over."""
    saver = Checkpointer(Trainer.build_model(tiny_cfg), str(out))
    saver.save("model_0000001", iteration=1)
    saver.save("model_0000003", iteration=3)
    saver.save("model_0000005", iteration=5)
    (out / "model_0000005.pth").write_bytes(b"")
    shutil.copy(weights(not_finite), out / "model_0000003.pth")
    run("--eval-only", "--resume")
    printed = capsys.readouterr().out
    assert f"WARNING: {out}/model_0000005.pth is empty" in printed
    assert f"WARNING: {out}/model_0000003.pth is not usable" in printed
    assert f"Weights     {out}/model_0000001.pth" in printed
    (out / "model_0000001.pth").unlink()
    assert "there are no weights to evaluate" in error("--eval-only", "--resume")


def test_evaluation_takes_classes_by_name(run, tmp_path, capsys, tiny_cfg):
    """The AP of a checkpoint whose classes have another order than the dataset's is of the same."""
    saver = Checkpointer(Trainer.build_model(tiny_cfg), str(tmp_path))
    saver.class_names = list("9876543210")
    saver.save("other_order")
    run("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "other_order.pth"))
    line = "WARNING: cls_score: 10 of 10 classes kept by name (0, 1, 2, ...), 10 of them moved"
    assert line in capsys.readouterr().out
