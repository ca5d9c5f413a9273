"""The kernel for CPUs: what other backends need not prove. Its numbers: test_dense.py."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    CrossEntropy,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    dense_classification_loss,
)
from retina_plugin.losses.backends import native
from tests.losses.reference import A, K, background, needs_compiler, random_logits, random_targets

pytestmark = needs_compiler


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, 0x7FC00000, -1])
@pytest.mark.parametrize("loss", [FocalLoss(), CrossEntropy(), FocalLossStar()], ids=repr)
def test_every_nan_gives_nan(bits, loss):
    """NaN has many bit patterns, and CUDA's differs from the CPU's."""
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(40).clone()
    x = x.view(1, 1, 5, 8).requires_grad_()
    total = dense_classification_loss([x], background(40), loss, 1, backend="native").total
    total.sum().backward()
    assert total.isnan() and x.grad.isnan().all()


@pytest.fixture
def set_threads():
    """torch.set_num_threads, restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("threads", [2, 7, 16])  # for 10 planes
def test_result_does_not_depend_on_the_number_of_threads(set_threads, threads, channels_last):
    """The gradient to the bit, the sums to 1e-7."""
    torch.manual_seed(0)
    targets = background(A * 400 * 300)
    x = torch.randn(1, A * K, 400, 300) - 2  # a thread gets at least 65,536 entries
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for number in (1, threads):
        set_threads(number)
        leaf = x.clone().requires_grad_()
        total = dense_classification_loss([leaf], targets, FocalLoss(), K, backend="native").total
        total.sum().backward()
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=0)
    assert torch.equal(results[0][1], results[1][1])


def test_float64_and_losses_without_a_formula_raise():
    class Derived(FocalLoss):
        """May override anything, so the kernel does not know it."""

    targets = random_targets()
    with pytest.raises(ConfigError, match="native cannot do .* of torch.float64 logits on cpu"):
        dense_classification_loss(
            random_logits(torch.float64), targets, FocalLoss(), K, backend="native"
        )
    for loss in (HingeLoss(), Derived()):
        with pytest.raises(ConfigError, match=f"native cannot do {type(loss).__name__}"):
            dense_classification_loss(random_logits(), targets, loss, K, backend="native")


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a library"),
    "cut to 1000 bytes": lambda path: os.truncate(path, 1000),
    "cut to 20000 bytes": lambda path: os.truncate(path, 20000),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}

LOAD = """
from retina_plugin.losses.backends import native
assert native.unavailable() is None, native.unavailable()
"""


def flip(content):
    """One bit in the middle."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The compiled library in a cache of its own. Compiling again takes no time: it is a copy."""
    whole = native._build(compiler()).read_bytes()
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_compile", lambda _, built: built.write_bytes(whole[:-32]))
    path = native._build(compiler())
    assert path.parent == tmp_path / "cache" and path.read_bytes() == whole
    return path


def compiler():
    return [next(c for c in ("c++", "g++") if shutil.which(c))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library_is_compiled_again(library, damage, log):
    """Not loaded, which could end the process, nor replaced by plain PyTorch."""
    whole = library.read_bytes()
    DAMAGES[damage](library)
    assert native._build(compiler()) == library
    assert "again: the cached library is damaged" in log.text
    assert library.read_bytes() == whole and list(library.parent.iterdir()) == [library]


def test_whole_library_is_not_compiled_again(library, monkeypatch):
    monkeypatch.setattr(native, "_compile", None)
    assert native._build(compiler()) == library


@pytest.mark.slow
def test_library_that_was_cut_does_not_end_the_process(library):
    """It is compiled and loaded in a process of its own. Loading what was cut is SIGBUS."""
    os.truncate(library, 20000)
    env = os.environ | {"RETINA_PLUGIN_CACHE": str(library.parent), "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", LOAD], env=env, timeout=120).returncode == 0


def test_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """With its variable."""
    cache = tmp_path / "file"
    cache.write_text("")
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(cache))
    with pytest.raises(RuntimeError, match=f"kernel to {cache}/native.*RETINA_PLUGIN_CACHE"):
        native._build(compiler())
