"""The dense loss in plain PyTorch: pieces, and the faster formulas for low logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retina_plugin.losses import (
    CrossEntropy,
    FocalLoss,
    FocalLossStar,
    dense_classification_loss,
)
from tests.losses.reference import (
    GAMMAS,
    LEVELS,
    A,
    K,
    N,
    focal,
    random_logits,
    random_targets,
    targets_of,
    textbook,
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "A, K, H, W",
    [
        (5, 3, 150, 200),  # a piece of 2^18 logits is two anchors, or a run of positions
        (2, 5, 300, 310),  # some classes of an anchor
        (1, 2, 600, 450),  # some positions of a class
    ],
)
def test_levels_of_several_pieces(A, K, H, W, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, A * K, H, W, generator=generator).mul(4).sub(2)
    logits = [x.contiguous(memory_format=layout).requires_grad_()]
    label_NR = torch.randint(-300, 40, (1, H * W * A), generator=generator)
    targets = targets_of(torch.where(label_NR < K, label_NR.clamp(min=-1), -2))
    assert len(targets.positive_image) > 1000 and len(targets.ignored_image) > 1000
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend="eager")
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, 0.25, 2.0, num_classes=K)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits[0].grad.double(), grads[0], rtol=1e-6, atol=1e-30)


class LargestSoftplus(TorchDispatchMode):
    """Notes the largest number of entries that softplus is computed of."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.softplus.default:
            self.size = max(self.size, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "loss, elementwise",
    [
        *((FocalLoss(0.25, gamma), lambda x_t, g=gamma: focal(x_t, g)) for gamma in GAMMAS),
        (CrossEntropy(), lambda x_t: focal(x_t, 0.0)),
        (FocalLossStar(0.25, 2.0, 1.0), lambda x_t: -F.logsigmoid(2 * x_t + 1) / 2),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),  # without an address
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_background_needs_no_softplus(loss, elementwise, dtype):
    """log1p is faster. Positive and ignored anchors may be high; one high background logit may not.

    The result is right in both cases.
    """
    targets = random_targets()
    logits = [x.detach().clamp(max=1.49).requires_grad_() for x in random_logits(dtype)]
    h, w = LEVELS[0]
    view = logits[0].detach().view(N, A, K, h * w)
    for image, anchor, k in zip(
        targets.positive_image, targets.positive_anchor, targets.positive_class
    ):
        if anchor < h * w * A:
            view[image, anchor % A, k, anchor // A] = 9.0
    for image, anchor in zip(targets.ignored_image, targets.ignored_anchor):
        if anchor < h * w * A:
            view[image, anchor % A, :, anchor // A] = 9.0

    def largest_softplus():
        with LargestSoftplus() as softplus:
            out = dense_classification_loss(logits, targets, loss, K, backend="eager")
        sums, grads = textbook(logits, targets, loss.alpha, None, elementwise)
        rtol = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(out.total.double(), sums, rtol=rtol, atol=0)
        # FL* rounds gamma x - beta before the exponential
        grad_rtol = rtol * (4 if isinstance(loss, FocalLossStar) else 1)
        for x, expected in zip(torch.autograd.grad(out.total.sum(), logits), grads):
            torch.testing.assert_close(x.double(), expected, rtol=grad_rtol, atol=1e-30)
        with torch.no_grad():
            value = dense_classification_loss(logits, targets, loss, K, backend="eager").total
        torch.testing.assert_close(value, out.total.detach(), rtol=rtol, atol=0)
        return softplus.size

    num_positives = len(targets.positive_image)
    assert largest_softplus() <= num_positives
    view[N - 1, 0, 0, 0] = 9.0  # this image is background only
    assert largest_softplus() > num_positives
