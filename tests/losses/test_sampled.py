"""The loss of chosen anchors against the dense loss."""

import pytest
import torch

from retina_plugin.losses import (
    CrossEntropy,
    FocalLoss,
    HingeLoss,
    anchor_losses,
    dense_classification_loss,
    sampled_classification_loss,
)
from retina_plugin.modeling.shapes import gather_anchors
from tests.losses.reference import ALPHA_PER_CLASS, K, N, random_logits, random_targets


@pytest.mark.parametrize(
    "loss", [FocalLoss(), CrossEntropy(ALPHA_PER_CLASS), HingeLoss()], ids=repr
)
def test_sampled_loss_of_all_anchors_is_the_dense_loss(loss):
    """Value, parts and gradient of all anchors that are not ignored, in random order."""
    logits, targets = random_logits(), random_targets()
    dense_out = dense_classification_loss(logits, targets, loss, K)
    dense_out.total.sum().backward()
    expected = [x.grad for x in logits]

    image, anchor = torch.where(anchor_losses(logits, targets, loss, K) > -torch.inf)
    shuffled = torch.randperm(len(image))
    image, anchor = image[shuffled], anchor[shuffled]
    again = [x.detach().requires_grad_() for x in logits]
    rows = gather_anchors(again, image, anchor, K)
    out = sampled_classification_loss(rows, image, anchor, targets, loss)
    out.total.sum().backward()
    for ours, theirs in zip(out, dense_out):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for x, grad in zip(again, expected):
        torch.testing.assert_close(x.grad, grad, rtol=1e-6, atol=1e-30)


def test_sampled_loss_of_nothing_is_exactly_zero_with_a_graph():
    no_anchors = torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(0, K, requires_grad=True)
    out = sampled_classification_loss(rows, no_anchors, no_anchors, random_targets(), FocalLoss())
    out.total.sum().backward()
    assert torch.equal(out.total.detach(), torch.zeros(N)) and rows.grad.shape == (0, K)
