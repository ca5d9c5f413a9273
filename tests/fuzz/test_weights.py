"""Weights files of every format: tensors, or one line. Nothing in them runs."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from retina_plugin.weights import read_checkpoint
from tests.fuzz.counting import fuzz
from tests.fuzz.mutation import JUNK, damaged_bytes, damaged_tree, randoms, read_or_one_line

HOSTILE = [
    b"cos\nsystem\n(S'true'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR0",
    b"c__builtin__\nexec\n(S'1'\ntR0",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    b"(S'true'\nios\nsystem\n.",
    b"csubprocess\nPopen\n((S'true'\nltR.",
    b"ctorch.serialization\nload\n(S'x'\ntR.",
    b"cnumpy\nload\n(S'x'\ntR.",
    b"cnumpy\nfromfile\n(S'/etc/hostname'\ntR.",
    *(b"R", b"b", b"o", b"\x81", b"\x92", b"\x93", b"0", b"h\x00", b"r\xff\xff\xff\x7f"),
    *(b"\x82\x01", b"Q"),
]


def tree():
    """A checkpoint as a training writes it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 2, generator=generator)
    model = collections.OrderedDict(
        {"head.weight": weight, "head.bias": torch.zeros(3), "counter": torch.tensor(7)}
    )
    groups = [{"lr": 0.1, "params": [0]}]
    optimizer = {"state": {0: {"momentum_buffer": weight}}, "param_groups": groups}
    return {"model": model, "trainer": {"iteration": 9, "optimizer": optimizer}, "iteration": 9}


def saved(content, format):
    """The bytes of a file in one of the formats that are read."""
    buffer = io.BytesIO()
    if format == "zip":
        torch.save(content, buffer)
    elif format == "old":
        torch.save(content, buffer, _use_new_zipfile_serialization=False)
    elif format == "safetensors":
        return safetensors.torch.save({k: v.contiguous() for k, v in content["model"].items()})
    else:
        arrays = {k: v.numpy() if torch.is_tensor(v) else v for k, v in content["model"].items()}
        wrapped = {"model": arrays, "__author__": "x"} if format == "pkl" else arrays
        buffer.write(pickle.dumps(wrapped, protocol=4 if format == "pkl" else 2))
    return buffer.getvalue()


FORMATS = ["zip", "old", "safetensors", "pkl", "pkl of Caffe2"]


@pytest.fixture(scope="module")
def files():
    return {format: saved(tree(), format) for format in FORMATS}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "weights.pth"


def check(path):
    """Read a file; what comes out is tensors of numbers that can be used."""
    checkpoint = read_or_one_line(read_checkpoint, path)
    if checkpoint is not None:
        assert isinstance(checkpoint, dict) and checkpoint["model"]
        for name, value in checkpoint["model"].items():
            assert isinstance(name, str) and isinstance(value, torch.Tensor)
            value.clone().double().sum()  # all of its memory is there
    return checkpoint


@pytest.mark.parametrize("format", FORMATS)
def test_whole_files_are_read(files, path, format):
    """What is damaged below is right before."""
    path.write_bytes(files[format])
    model = check(path)["model"]
    assert all(torch.equal(model[name], value) for name, value in tree()["model"].items())


@fuzz(40, rng=randoms(), format=st.sampled_from(FORMATS))
def test_damaged_bytes(files, path, rng, format):
    """Cut, flipped, doubled; instructions of a pickle that would run programs put in."""
    path.write_bytes(damaged_bytes(files[format], rng, HOSTILE))
    check(path)


@fuzz(20, rng=randoms(), format=st.sampled_from(["zip", "zip", "old"]))
def test_damaged_pickles_in_whole_files(files, path, rng, format):
    """A zip file whose checksums are right, around a pickle that is not; lengths of records too."""
    buffer = io.BytesIO()
    if format == "zip":
        whole = zipfile.ZipFile(io.BytesIO(files["zip"]))
        with zipfile.ZipFile(buffer, "w") as new:
            for name in whole.namelist():
                data = whole.read(name)
                if name.endswith("data.pkl") or rng.random() < 0.1:
                    data = damaged_bytes(data, rng, HOSTILE)
                if rng.random() < 0.97:
                    new.writestr(name, data)
        path.write_bytes(buffer.getvalue())
    else:
        start, end = sorted(rng.randrange(len(files["old"])) for _ in range(2))
        middle = damaged_bytes(files["old"][start:end], rng, HOSTILE)
        path.write_bytes(files["old"][:start] + middle + files["old"][end:])
    check(path)


@fuzz(15, rng=randoms(), format=st.sampled_from(["zip", "old", "pkl", "pkl of Caffe2"]))
def test_other_contents(path, rng, format):
    """Whole files that hold something else than a state dict, or things beside the tensors."""
    numpy = [np.float64(3), np.array(["a"]), np.array([None]), np.zeros((2, 0)), np.array(1 + 2j)]
    tensors = [torch.zeros(2, 0), torch.zeros(3).to_sparse(), torch.empty(2, device="meta")]
    odd = [tree(), {1: 2}, (1, 2), b"x", {3}]
    content = damaged_tree(tree(), rng, [*JUNK, *numpy, *tensors, *odd])
    try:
        data = saved(content, format)
    except Exception:  # it cannot be written
        return
    path.write_bytes(data)
    check(path)


@fuzz(15, data=st.binary(max_size=400), head=st.sampled_from(["", *FORMATS]))
def test_random_bytes(files, path, data, head):
    """With and without the first bytes of a format."""
    path.write_bytes((files[head][:9] if head else b"") + data)
    check(path)
