"""Class surgery: which rows of the last classification conv are kept, and what is said."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer, read_checkpoint

A = 3


class Model(nn.Module):
    """The detector's names; the last classification conv has a prior of its own."""

    def __init__(self, classes):
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 1)
        self.head = nn.Module()
        self.head.cls_score = nn.Conv2d(2, A * classes, 1)
        self.head.bbox_pred = nn.Conv2d(2, A * 4, 1)
        nn.init.constant_(self.head.cls_score.bias, -4.5)


def rows(module):
    """(A, K, C + 1): weight and bias of each anchor and class."""
    flat = torch.cat((module.weight.flatten(1), module.bias[:, None]), dim=1)
    return flat.detach().clone().unflatten(0, (A, -1))


@pytest.fixture
def finetune(tmp_path, log):
    """``finetune(theirs, ours)``: the file's rows, the model's before and after, the warnings."""

    def run(theirs, ours, names=True):
        saved = Model(len(theirs))
        nn.init.normal_(saved.head.cls_score.bias)
        checkpointer = Checkpointer(saved, str(tmp_path))
        checkpointer.class_names = theirs if names else None
        checkpointer.save("weights", tag=False)
        model = Model(len(ours))
        before = rows(model.head.cls_score)
        checkpointer = Checkpointer(model, str(tmp_path / "new"))
        checkpointer.class_names = ours
        log.clear()
        checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=True)
        for name, value in saved.state_dict().items():
            if "cls_score" not in name:
                assert torch.equal(model.state_dict()[name], value), name
        lines = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        return rows(saved.head.cls_score), before, rows(model.head.cls_score), lines

    return run


def test_classes_of_the_same_name_keep_all_their_rows(finetune):
    saved, before, after, lines = finetune(["cat", "car", "bus", "dog"], ["bus", "tram", "car"])
    assert torch.equal(after[:, 0], saved[:, 2]) and torch.equal(after[:, 2], saved[:, 1])
    assert torch.equal(after[:, 1], before[:, 1]) and (after[:, 1, -1] == -4.5).all()
    assert lines == ["cls_score: 2 of 3 classes kept by name (bus, car), 1 new"]


def test_other_order_moves_rows_and_says_so(finetune):
    saved, _, after, lines = finetune(["a", "b", "c"], ["c", "b", "a"])
    assert torch.equal(after, saved[:, [2, 1, 0]])
    assert lines == [
        "cls_score: 3 of 3 classes kept by name (c, b, a), 2 of them moved because the dataset has "
        "them in another order, 0 new"
    ]


@pytest.mark.parametrize("names", [True, False])
def test_same_classes_are_loaded_as_they_are(finetune, names):
    saved, _, after, lines = finetune(["a", "b"], ["a", "b"], names)
    assert torch.equal(after, saved) and lines == []


def test_renamed_classes_keep_their_places(finetune):
    """As many classes, and none by name: numbers that got names, another language, ..."""
    saved, _, after, lines = finetune(["0", "1"], ["zero", "one"])
    assert torch.equal(after, saved)
    assert lines == [
        "cls_score: 2 classes keep their places, because none of their names (0, 1) is one of the "
        "dataset's (zero, one)"
    ]


def test_no_name_in_common_and_another_number_is_all_new(finetune):
    _, before, after, lines = finetune(["a", "b", "c"], ["x", "y"])
    assert torch.equal(after, before)
    assert lines == ["cls_score: 0 of 2 classes kept by name, 2 new"]


def test_names_that_a_file_has_twice_are_none(finetune):
    """torchvision's COCO has ten classes "N/A"."""
    saved, before, after, lines = finetune(["N/A", "car", "N/A", "bus"], ["N/A", "bus", "car"])
    assert torch.equal(after[:, 1:], saved[:, [3, 1]]) and torch.equal(after[:, 0], before[:, 0])
    assert lines == ["cls_score: 2 of 3 classes kept by name (bus, car), 1 new"]


def test_unknown_names_are_not_guessed(finetune):
    _, before, after, lines = finetune(["a", "b", "c"], ["a", "b"], names=False)
    assert torch.equal(after, before)
    assert lines == ["cls_score: 3 classes without known names are not used, 2 new"]


def test_names_of_a_file_cannot_break_the_line(finetune):
    *_, lines = finetune(["a\n\x1b[2J" + "x" * 99, "b"], ["a\n\x1b[2J" + "x" * 99, "c"])
    assert all(line.isprintable() and len(line) < 150 for line in lines) and len(lines) == 1


@pytest.fixture
def evaluate(tmp_path, log):
    """``evaluate(theirs, ours)``: rows of the file and of the evaluated model, and the warnings."""

    def run(theirs, ours, resume=False):
        saver = Checkpointer(Model(len(theirs)), str(tmp_path))
        nn.init.normal_(saver.model.head.cls_score.bias)
        saver.class_names = theirs
        saver.save("model_0000001", iteration=1)
        model = Model(len(ours))
        checkpointer = Checkpointer(model, str(tmp_path))
        checkpointer.class_names = ours
        log.clear()
        checkpointer.load_complete(str(tmp_path / "model_0000001.pth"), resume=resume)
        lines = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        return rows(saver.model.head.cls_score), rows(model.head.cls_score), lines

    return run


@pytest.mark.parametrize("resume", [False, True])
def test_evaluation_takes_classes_by_name(evaluate, resume):
    """Else the AP would be that of other classes, and nothing would say so."""
    saved, loaded, lines = evaluate(["a", "b", "c"], ["c", "a", "b"], resume)
    assert torch.equal(loaded, saved[:, [2, 0, 1]]) and "3 of them moved" in lines[0]
    saved, loaded, lines = evaluate(["N/A", "a", "b", "N/A", "c"], ["c", "a"], resume)
    assert torch.equal(loaded, saved[:, [4, 1]]) and len(lines) == 1
    saved, loaded, lines = evaluate(["a", "b"], ["a", "b"], resume)
    assert torch.equal(loaded, saved) and not lines


def test_evaluation_keeps_renamed_classes_and_says_so(evaluate):
    saved, loaded, lines = evaluate(["a", "tv"], ["a", "television"])
    assert torch.equal(loaded, saved)
    assert lines == [
        "cls_score: the weights and the dataset name 1 classes differently (class 1: tv, "
        "television); they keep their places"
    ]


def test_evaluation_refuses_classes_that_the_weights_lack(evaluate):
    with pytest.raises(ConfigError, match=r"class 1 of the weights is 'b', which is class 0 of"):
        evaluate(["a", "b"], ["b", "c"])
    with pytest.raises(ConfigError, match="has a head of 2 classes"):
        evaluate(["a", "b"], ["a", "b", "c"])


def test_resume_has_no_surgery(tmp_path):
    """A checkpoint to resume from is loaded as it is."""
    saver = Checkpointer(Model(2), str(tmp_path))
    saver.class_names = ["a", "b"]
    saver.save("model_0000001", iteration=1)
    model = Model(2)
    resumed = Checkpointer(model, str(tmp_path))
    resumed.class_names = ["b", "a"]
    assert resumed.resume_or_load("")["iteration"] == 1
    assert torch.equal(rows(model.head.cls_score), rows(saver.model.head.cls_score))


# Class names in files --------------------------------------------------------------------------


def test_class_names_of_every_kind_of_file_are_read(tmp_path):
    names = ["car", "Fußgänger", "信号"]
    state = {"a": torch.ones(2)}
    for content in (
        {"model": state, "class_names": names},
        {"state_dict": state, "meta": {"CLASSES": tuple(names)}},  # MMDetection 2
        {"state_dict": state, "meta": {"dataset_meta": {"classes": tuple(names)}}},  # and 3
        {"state_dict": state, "meta": {"dataset_meta": {"CLASSES": names}}},
    ):
        torch.save(content, tmp_path / "a.pth")
        assert read_checkpoint(tmp_path / "a.pth")["class_names"] == names
    save_file(state, tmp_path / "a.safetensors", {"class_names": json.dumps(names)})
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert read["class_names"] == names and torch.equal(read["model"]["a"], state["a"])


@pytest.mark.parametrize("names", [None, [], "car", [1, 2], {"a": 1}, ["a", None]])
def test_unusable_class_names_are_none(tmp_path, names):
    torch.save({"model": {"a": torch.ones(2)}, "class_names": names}, tmp_path / "a.pth")
    assert "class_names" not in read_checkpoint(tmp_path / "a.pth")
    metadata = {"class_names": json.dumps(names)}
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    assert "class_names" not in read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_damaged_metadata_is_no_names(tmp_path, text):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"class_names": text})
    assert list(read_checkpoint(tmp_path / "a.safetensors")) == ["model"]
