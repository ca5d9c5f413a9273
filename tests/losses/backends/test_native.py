"""The kernel for CPUs: what other backends need not prove. Its numbers: test_dense.py."""

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
