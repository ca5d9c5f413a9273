"""Sums of the box loss; the losses themselves are in tests/losses/test_regression.py."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from retina_plugin.losses.regression import L1, BoxLoss, GIoU, SmoothL1
from retina_plugin.losses.targets import BACKGROUND, DenseTargets
from retina_plugin.modeling import box_regression
from retina_plugin.modeling.box_regression import BoxTransform, box_loss_sums, encode

TRANSFORM = BoxTransform((1.0, 1.0, 1.0, 1.0))


def random_boxes(n, seed, size=96.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=generator) * size * 0.4
    return torch.cat([corner, corner + side], dim=1)


@pytest.mark.parametrize("loss", [SmoothL1(0.1), L1()], ids=repr)
@pytest.mark.parametrize("positives", [0, 1, 40])
def test_the_loss_of_all_anchors_is_that_of_the_positives(loss, positives):
    """Sums to rounding, gradients to the bit, whatever is predicted for the others."""
    generator = torch.Generator().manual_seed(positives)
    N, A, shapes = 2, 9, [(6, 5), (3, 2)]
    R = sum(A * h * w for h, w in shapes)
    label_NR = torch.full((N, R), BACKGROUND, dtype=torch.int16)
    chosen = torch.randperm(N * R, generator=generator)
    label_NR.view(-1)[chosen[:positives]] = 3
    gt_NR = torch.randint(max(positives, 1), (N, R), generator=generator)
    targets = DenseTargets(label_NR, gt_NR, random_boxes(positives, 1))
    anchors = random_boxes(R, 2)
    results = []
    for sums_of in (box_regression._of_positives, box_regression._of_all):
        deltas = [
            torch.randn(N, A * 4, h, w, generator=generator.manual_seed(3)) for h, w in shapes
        ]
        h, w = shapes[0]
        others = [i.item() for i in chosen[positives:] if i % R < A * h * w]
        for i, wild in zip(others, (torch.inf, -torch.inf, torch.nan, 1e30)):
            place, a = i % R // A, i % R % A
            deltas[0][i // R, 4 * a : 4 * a + 4, place // w, place % w] = wild
        deltas = [x.requires_grad_() for x in deltas]
        sums_N = sums_of(loss, TRANSFORM, anchors, deltas, targets)
        results.append((sums_N.detach(), torch.autograd.grad(sums_N.sum(), deltas)))
    (sums, grads), (sums_of_all, grads_of_all) = results
    torch.testing.assert_close(sums_of_all, sums, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(grads_of_all, grads))
    assert positives or torch.equal(sums_of_all, torch.zeros(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_are_encoded_as_by_detectron2(dtype):
    anchors, boxes = random_boxes(200, 4).to(dtype), random_boxes(200, 5).to(dtype)
    weights = (10.0, 5.0, 3.0, 7.0)
    expected = Box2BoxTransform(weights).get_deltas(anchors, boxes)
    assert torch.equal(encode(anchors, boxes, weights), expected)


class Lightest(BoxLoss):
    """Not one of an anchor alone: the mean over the rows is taken off."""

    def __call__(self, prediction, target):
        loss = (prediction - target).abs().sum(dim=1)
        return loss - loss.mean()


def test_only_losses_of_an_anchor_alone_get_all_anchors(monkeypatch):
    """On an accelerator; a loss of one's own sees the positives there, too."""
    called = []
    monkeypatch.setattr(box_regression, "_of_all", lambda *_: called.append("all"))
    monkeypatch.setattr(box_regression, "_of_positives", lambda *_: called.append("positives"))
    for device in ("cpu", "meta"):
        for loss in (SmoothL1(), L1(), GIoU(), Lightest()):
            box_loss_sums(loss, TRANSFORM, torch.zeros(1, 4, device=device), [], None)
    assert called == ["positives"] * 4 + ["all", "all", "positives", "positives"]
