"""Reading weights: every format and wrapper loads, nothing runs, everything else is one line."""

import argparse
import collections
import gzip
import io
import pickle
import random
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retina_plugin.errors import ConfigError
from retina_plugin.weights import read_checkpoint
from tests.weights import hostile

STATE = {
    "conv.weight": torch.randn(4, 3, 2, 2),
    "conv.bias": torch.randn(4).half(),
    "norm.num_batches_tracked": torch.tensor(7),
    "norm.running_var": torch.rand(3, 2).t(),  # not contiguous
}
ARRAYS = {name: value.numpy() for name, value in STATE.items()}
BLOBS = {
    "conv1_w": np.ones((2, 3), "f4"),
    "conv1_w_momentum": np.ones(3),
    "fc_b": np.zeros(0, "f4"),
}


def old(data, path):
    torch.save(data, path, _use_new_zipfile_serialization=False)


def dump(data, path, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol))


def error(path):
    """The one line that reading ends with."""
    with pytest.raises(ConfigError) as raised:
        read_checkpoint(path)
    text = str(raised.value)
    assert str(path) in text and text.isprintable() and len(text) < 600
    return text


def check_state(state, expected=STATE):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


SAVED = {
    "torch": torch.save,
    "old torch": old,
    **{f"pickle {n}": lambda data, path, n=n: dump(data, path, n) for n in range(6)},
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".ckpt", ".bin", ""])
@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED.keys())
@pytest.mark.parametrize("values", [STATE, ARRAYS], ids=["tensors", "arrays"])
def test_every_format_is_read(tmp_path, save, values, suffix):
    """With tensors and with arrays, under any name."""
    path = tmp_path / f"weights{suffix}"
    extra = {"iteration": np.int64(3), "lr": np.float32(0.5), "name": "ü", "raw": b"\0\xff"}
    save({"model": values, "__author__": "me", "order": np.arange(3), **extra}, path)
    checkpoint = read_checkpoint(path)
    check_state(checkpoint.pop("model"))
    assert checkpoint.pop("order").tolist() == [0, 1, 2]
    assert checkpoint == {"__author__": "me", **extra}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_safetensors(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file({k: v.contiguous() for k, v in STATE.items()}, path, {"format": "pt"})
    check_state(read_checkpoint(path)["model"])


def test_state_of_a_training_is_read(tmp_path):
    """Optimizer, schedule, random number generators."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    generators = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    path = tmp_path / "a.pth"
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved |= {"schedule": schedule.state_dict(), "rng": generators, "ids": {1, 2}}
    torch.save(saved, path)
    loaded = read_checkpoint(path)
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])
    assert loaded["schedule"]["milestones"] == collections.Counter([2, 3])
    assert loaded["rng"]["python"] == generators["python"] and loaded["ids"] == {1, 2}
    assert (loaded["rng"]["numpy"][1] == generators["numpy"][1]).all()
    np.random.set_state(loaded["rng"]["numpy"])
    assert torch.equal(loaded["rng"]["torch"], generators["torch"])


WRAPPED = {
    "flat": STATE,
    "model": {"model": STATE, "epoch": 3},
    "Lightning": {"epoch": 3, "state_dict": STATE, "hyper_parameters": {"lr": 0.1}, "loops": {}},
    "mmdetection": {"meta": {"config": "x"}, "state_dict": STATE, "optimizer": {}},
    "model_state_dict": {"model_state_dict": STATE, "loss": np.float64(3)},
    "twice": {"model": {"state_dict": STATE}},
    "ordered": collections.OrderedDict(STATE),
    "among numbers": {**STATE, "epoch": 3, "name": "x", 7: torch.ones(2)},
}


@pytest.mark.parametrize("save", [torch.save, old, dump])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrappers_are_taken_off(tmp_path, wrapped, save):
    save(wrapped, tmp_path / "a.pth")
    check_state(read_checkpoint(tmp_path / "a.pth")["model"])


def test_pycls_means_what_it_means_in_detectron2(tmp_path):
    """Its names are matched by their endings, and batch norm's counters are left out."""
    torch.save({"model_state": STATE, "epoch": 3}, tmp_path / "a.pyth")
    loaded = read_checkpoint(tmp_path / "a.pyth")
    assert loaded["matching_heuristics"] is True and loaded["__author__"] == "pycls"
    assert loaded["model"].keys() == STATE.keys() - {"norm.num_batches_tracked"}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("data", [{"blobs": BLOBS, "cfg": "MODEL: x"}, BLOBS])
def test_caffe2_pickles_mean_what_they_mean_in_detectron2(tmp_path, data, protocol):
    """With "blobs" (detectors) and without (ImageNet)."""
    dump(data, tmp_path / "a.pkl", protocol)
    loaded = read_checkpoint(tmp_path / "a.pkl")
    assert loaded["__author__"] == "Caffe2" and loaded["matching_heuristics"] is True
    assert loaded["model"].keys() == {"conv1_w", "fc_b"}


def test_pickle_of_python_2(tmp_path):
    """Its arrays are text in Latin-1, and other byte orders occur."""
    values = np.arange(-3, 3, dtype=">f4")
    data = values.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nI3\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nT" + struct.pack("<i", len(data)) + data + b"tb"
    )
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}S'conv1_w'\n" + array + b"s.")
    loaded = read_checkpoint(tmp_path / "a.pkl")["model"]["conv1_w"]
    assert torch.equal(loaded, torch.arange(-3.0, 3.0).reshape(2, 3))


# Not weights ----------------------------------------------------------------------------------


def make(path, kind):
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1000)}}, whole)
    whole = whole.getvalue()
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("a"))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b.txt", "text")
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b"0" * 10**6)
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind == "list":
        torch.save([torch.ones(3)], path)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "\n": 3}, path)
    elif kind == "quantised":
        torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}, path)
    elif kind == "sparse":
        torch.save({"a": torch.ones(2).to_sparse()}, path)
    elif kind == "meta":
        torch.save({"a": torch.ones(2, device="meta")}, path)
    elif kind == "complex":
        torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path)
    elif kind == "expanded":
        torch.save({"a": torch.ones(1).expand(10**12)}, path)
    elif kind == "text arrays":
        dump({"a": np.array(["x"])}, path)
    elif kind != "missing":
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 1
        contents = {
            "empty": b"",
            "text": b"not weights\n",
            "web page": b"\n <!DOCTYPE html><html>",
            "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "gzip": gzip.compress(whole),
            "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
            "cut": whole[: len(whole) // 2],
            "cut at the end": whole[:-1],
            "one byte": whole[:1],
            "bit": bytes(broken),
            "cut pickle": pickle.dumps({"a": np.ones(9)})[:-5],
            "pickle of a list": pickle.dumps([1]),
            "safetensors cut": (7).to_bytes(8, "little") + b'{"a":3}',
            "json": b'{"a": 1}',
        }
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "missing": "No such file",
        "folder": "is a folder",
        "empty": "is empty",
        "text": "a text file",
        "json": "a text file",
        "web page": "a web page",
        "git-lfs": "git lfs pull",
        "gzip": "gunzip",
        "image": "no weights file",
        "tar": "tar archive",
        "zip": "zip archive that torch.save did not write",
        "compressed": "compressed",
        "cut": "damaged or incomplete",
        "cut at the end": "damaged or incomplete",
        "one byte": "is a text file",
        "bit": "wrong checksum",
        "cut pickle": "damaged or incomplete",
        "pickle of a list": "holds a list",
        "safetensors cut": "damaged or incomplete safetensors",
        "list": "holds a list",
        "tensor": "holds a Tensor",
        "no tensors": "has no tensors, but epoch",
        "quantised": "_rebuild_qtensor",
        "sparse": "_rebuild_sparse_tensor",
        "meta": "_rebuild_meta_tensor_no_storage",
        "complex": "no tensor of plain numbers (complex64",
        "expanded": "claims to be larger than the file",
        "text arrays": "not an array of numbers",
    }.items(),
)
def test_no_weights_file_is_one_line(tmp_path, kind, expected):
    """With the path and what is wrong, whatever the name ends with."""
    for suffix in (".pth", ".pkl", ".safetensors"):
        make(tmp_path / f"a{suffix}", kind)
        assert expected in error(tmp_path / f"a{suffix}")


def test_a_changed_bit_is_found(tmp_path):
    """In any part of the file whose bytes mean something: torch.load itself does not see it."""
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.arange(100.0)}}, path)
    whole = path.read_bytes()
    silent = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            loaded = read_checkpoint(path)["model"]["a"]
        except ConfigError:
            continue
        silent += 1  # padding, or a date
        assert torch.equal(loaded, torch.arange(100.0))
    assert silent < len(whole) / 7 / 2


# Hostile --------------------------------------------------------------------------------------

CALLS = tuple(hostile.calls("marker"))
HIDDEN = {
    "value": lambda call: {"model": {"a": torch.ones(2), "b": call}},
    "alone": lambda call: call,
    "beside": lambda call: {"model": {"a": torch.ones(2)}, "cfg": [{"deep": (call,)}]},
    "blobs": lambda call: {"blobs": {"conv1_w": np.ones(2), "b": call}},
    "author": lambda call: {"model": {"a": np.ones(2)}, "__author__": call},
}


@pytest.mark.parametrize("save", [dump, torch.save, old], ids=["pickle", "torch", "old torch"])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN.keys())
@pytest.mark.parametrize("kind", CALLS)
def test_nothing_is_run(tmp_path, capfd, kind, hidden, save):
    """Whatever a file names, and wherever in it."""
    marker = tmp_path / "marker"
    path = tmp_path / "a.pth"
    save(hidden(hostile.calls(marker)[kind]), path)
    before = set(tmp_path.iterdir())
    assert "refused" in error(path)
    assert set(tmp_path.iterdir()) == before
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
@pytest.mark.parametrize("kind", CALLS)
def test_nothing_is_run_by_other_protocols(tmp_path, kind, protocol):
    marker = tmp_path / "marker"
    dump({"a": hostile.calls(marker)[kind]}, tmp_path / "a.pkl", protocol)
    before = set(tmp_path.iterdir())
    assert "refused" in error(tmp_path / "a.pkl")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", hostile.tricks(""))
def test_tricks_of_the_pickle_machine_are_refused(tmp_path, name):
    """In a pickle, and in the pickle of a torch file."""
    marker = tmp_path / "marker"
    raw = hostile.tricks(marker)[name]
    (tmp_path / "a.pkl").write_bytes(raw)
    (tmp_path / "b.pkl").write_bytes(raw if raw[:1] == b"\x80" else b"\x80\x04" + raw)
    hostile.torch_zip(tmp_path / "c.pth", raw)
    for file in ("a.pkl", "b.pkl", "c.pth"):
        error(tmp_path / file)
    assert not marker.exists()


def test_a_storage_in_a_pickle_is_no_way_in(tmp_path):
    """A tensor in a pickle holds a whole file of torch.save."""
    marker = tmp_path / "marker"
    inner = io.BytesIO()
    call = hostile.calls(marker)["os.system"]
    torch.save(call, inner, _use_new_zipfile_serialization=False)
    loader = torch.storage._load_from_bytes
    for payload in (inner.getvalue(), pickle.dumps(call), b""):
        dump({"a": hostile.Call(loader, payload)}, tmp_path / "a.pkl")
        assert "refused" in error(tmp_path / "a.pkl")
    assert not marker.exists()


def rebuilt(*arguments):
    return hostile.Call(torch._utils._rebuild_tensor_v2, *arguments)


def test_a_tensor_stays_in_its_memory(tmp_path):
    """Sizes, strides and offsets of a pickle are checked against its bytes."""
    storage = torch.arange(4.0)._typed_storage()
    good = rebuilt(storage, 0, (2, 2), (2, 1), False, collections.OrderedDict())
    dump({"model": {"a": good}, "__author__": ""}, tmp_path / "a.pkl")
    assert read_checkpoint(tmp_path / "a.pkl")["model"]["a"].tolist() == [[0, 1], [2, 3]]
    for offset, size, stride in (
        *((0, (5,), (1,)), (1, (4,), (1,)), (-1, (4,), (1,)), (0, (2, 2), (3, 2))),
        *((0, (10**12,), (0,)), (0, (2,), (-1,)), (0, (2,), (10**18,)), (2**62, (1,), (1,))),
        *((0, (2, 2), (1,)), (0, "ab", (1,)), (0, (1.0,), (1,)), (None, (2,), (1,))),
    ):
        bad = rebuilt(storage, offset, size, stride, False, collections.OrderedDict())
        dump({"model": {"a": bad}, "__author__": ""}, tmp_path / "a.pkl")
        error(tmp_path / "a.pkl")


BOMBS = {
    "list of lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "itself": b"\x80\x02}q\0Va\nh\0s.",
    "bytes": b"\x80\x05\x8e" + (2**62).to_bytes(8, "little") + b".",
    "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "text": b"\x80\x04\x8d" + (2**50).to_bytes(8, "little") + b".",
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "long number": b"I" + b"9" * 100_000 + b"\n.",
    "key": b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns.",
    "shared": b"\x80\x02]q\0" + b"]q\1(h\0h\0e]q\0(h\1h\1e" * 12 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_cannot_ask_for_everything(tmp_path, name):
    """All memory, or all time."""
    (tmp_path / "a.pkl").write_bytes(BOMBS[name])
    hostile.torch_zip(tmp_path / "a.pth", BOMBS[name])
    error(tmp_path / "a.pkl")
    error(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "call",
    [
        hostile.Call(bytearray, 10**11),
        hostile.Call(np.ndarray, (10**11,), "f8"),
        hostile.Call(np.core.multiarray._reconstruct, np.ndarray, (10**11,), b"f8"),
        hostile.Call(np.dtype, "V1000000000000"),
        hostile.Call(np.dtype, [("a", "O")]),
        hostile.Call(torch.zeros, 10**11),
        hostile.Call(torch.Tensor, 10**6, 10**6),
        hostile.Call(torch.UntypedStorage, 10**12),
    ],
)
@pytest.mark.parametrize("save", [dump, torch.save, old])
def test_memory_is_not_the_files_to_ask_for(tmp_path, call, save):
    save({"model": {"a": call, "b": torch.ones(1)}, "__author__": ""}, tmp_path / "a.pkl")
    error(tmp_path / "a.pkl")


def test_zip_that_reads_its_parts_twice_is_refused(tmp_path):
    """Two names for the same bytes, and parts that claim to be larger than the file."""
    torch.save({"a": torch.ones(10)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("a/data.pkl", archive.read("a/data.pkl"))
    assert "zip archive" in error(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_torchvisions_training_script_are_read(tmp_path, new_format):
    """They hold the command's options too, as a Namespace. What is in it is looked at as well."""
    path, marker = tmp_path / "checkpoint.pth", tmp_path / "marker"
    for options in (
        {"lr": 0.01, "device": torch.device("cpu")},
        {"lr": hostile.calls(marker)["eval"]},
    ):
        data = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(**options)}
        torch.save(data, path, _use_new_zipfile_serialization=new_format)
        if "device" in options:
            assert torch.equal(read_checkpoint(path)["model"]["a"], torch.ones(2))
        else:
            with pytest.raises(ConfigError, match="is refused"):
                read_checkpoint(path)
    assert not marker.exists()


def test_config_in_a_checkpoint_is_data(tmp_path):
    """Its IMPORTS are not imported, and its tags not followed."""
    (tmp_path / "imported.py").write_text("open('ran', 'w')")
    text = (
        f"IMPORTS: [{tmp_path / 'imported.py'}]\nA: !!python/object/apply:os.system ['touch ran']"
    )
    torch.save({"model": STATE, "cfg": text}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["cfg"] == text
    assert {p.name for p in tmp_path.iterdir()} == {"imported.py", "a.pth"}


def test_environment_cannot_turn_the_check_off(tmp_path, monkeypatch):
    """torch has a variable for that."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": hostile.Call(print, "ran")}, tmp_path / "a.pth")
    error(tmp_path / "a.pth")


@pytest.mark.parametrize("save", [torch.save, old])
def test_torch_is_told_to_run_nothing_too(tmp_path, monkeypatch, save):
    """In case that a file gets past our own check."""
    told, load = [], torch.load

    def record(*args, **kwargs):
        told.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", record)
    save(STATE, tmp_path / "a.pth")
    check_state(read_checkpoint(tmp_path / "a.pth")["model"])
    assert told == [True]


def test_threads_may_read_at_once(tmp_path):
    """torch's list of admitted names is global."""
    torch.save({"model": ARRAYS}, tmp_path / "a.pth")
    failed = []

    def read():
        try:
            for _ in range(20):
                check_state(read_checkpoint(tmp_path / "a.pth")["model"])
        except Exception as caught:
            failed.append(caught)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
