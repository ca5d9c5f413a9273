"""Random logits and targets, and the dense loss as a textbook computes it."""

import pytest
import torch
import torch.nn.functional as F

from retina_plugin.losses import DenseTargets
from retina_plugin.losses.backends import native
from retina_plugin.losses.targets import BACKGROUND, IGNORED

N, A, K = 3, 2, 5
LEVELS = [(7, 9), (4, 5), (1, 2)]
R = sum(h * w * A for h, w in LEVELS)
GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]  # Table 1b
ALPHA_PER_CLASS = (0.1, 0.9, 0.25, 0.5, 0.75)

# test_triton.py tests "triton", which needs CUDA or an interpreter
needs_compiler = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native kernel: {native.unavailable()}"
)
each_backend = pytest.mark.parametrize(
    "backend", ["eager", pytest.param("native", marks=needs_compiler)]
)


def random_logits(dtype=torch.float32, spread=4.0, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(N, A * K, h, w, generator=generator) * spread - 2 for h, w in LEVELS]
    if channels_last:
        levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    return [x.to(dtype).requires_grad_() for x in levels]


def random_targets(num_positive=14, num_ignored=11, seed=1):
    """Of the logits of ``random_logits``. The last image is background only."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(2 * R, generator=generator)[: num_positive + num_ignored]
    positive, ignored = chosen[:num_positive], chosen[num_positive:]
    label_NR = torch.full((N, R), BACKGROUND)
    label_NR.view(-1)[positive] = torch.randint(K, (num_positive,), generator=generator)
    label_NR.view(-1)[ignored] = IGNORED
    return targets_of(label_NR)


def targets_of(label_NR):
    """Targets for a classification loss, which reads no boxes."""
    return DenseTargets(label_NR.short(), torch.zeros_like(label_NR).long(), torch.zeros(1, 4))


def background(num_anchors):
    """Targets of one image without objects."""
    return targets_of(torch.full((1, num_anchors), BACKGROUND))


def focal(x_t, gamma):
    return -(torch.sigmoid(-x_t) ** gamma) * F.logsigmoid(x_t)


def textbook(logits, targets, alpha, gamma, elementwise=None, num_classes=K):
    """Permuted, concatenated, one-hot, in float64: sums (N,) of Eq. 5 and their gradients."""
    leaves = [x.detach().double().requires_grad_() for x in logits]
    flat = torch.cat(
        [
            x.unflatten(1, (-1, num_classes)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (N, HWA, K)
            for x in leaves
        ],
        dim=1,
    )
    onehot = torch.zeros_like(flat)
    onehot[targets.positive_image, targets.positive_anchor, targets.positive_class] = 1
    counted = torch.ones_like(flat[:, :, :1])
    counted[targets.ignored_image, targets.ignored_anchor] = 0
    x_t = torch.where(onehot == 1, flat, -flat)
    loss = (elementwise or (lambda x_t: focal(x_t, gamma)))(x_t) * counted
    if alpha is not None:
        alpha = torch.as_tensor(alpha, dtype=torch.float64)  # one, or (K,)
        loss = loss * torch.where(onehot == 1, alpha, 1 - alpha)
    sums = loss.sum(dim=(1, 2))
    grads = torch.autograd.grad(sums.sum(), leaves)
    return sums.detach(), grads
