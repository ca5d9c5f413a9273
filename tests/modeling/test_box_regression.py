"""Sums of the box loss; the losses themselves are in tests/losses/test_regression.py."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from retina_plugin.losses.regression import L1, BoxLoss, GIoU, SmoothL1
from retina_plugin.losses.targets import BACKGROUND, DenseTargets
from retina_plugin.modeling.box_regression import BoxTransform, box_loss_sums, encode

TRANSFORM = BoxTransform((1.0, 1.0, 1.0, 1.0))


def random_boxes(n, seed, size=96.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=generator) * size * 0.4
    return torch.cat([corner, corner + side], dim=1)


@pytest.mark.parametrize("loss", [SmoothL1(0.1), L1()], ids=repr)
@pytest.mark.parametrize("positives", [0, 1, 40])
def test_loss_on_a_gpu_is_that_on_the_cpu(pretend, loss, positives):
    """Sums to rounding, gradients to the bit, whatever is predicted for the other anchors."""
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
    for device in ("cpu", "cuda"):
        deltas = [
            torch.randn(N, A * 4, h, w, generator=generator.manual_seed(3)) for h, w in shapes
        ]
        h, w = shapes[0]
        others = [i.item() for i in chosen[positives:] if i % R < A * h * w]
        for i, wild in zip(others, (torch.inf, -torch.inf, torch.nan, 1e30)):
            location, a = i % R // A, i % R % A
            deltas[0][i // R, 4 * a : 4 * a + 4, location // w, location % w] = wild
        deltas = [x.requires_grad_() for x in deltas]
        with pretend(device, anchors):
            sums_N = box_loss_sums(loss, TRANSFORM, anchors, deltas, targets)
        results.append((sums_N.detach(), torch.autograd.grad(sums_N.sum(), deltas)))
    (cpu_sums, cpu_grads), (gpu_sums, gpu_grads) = results
    torch.testing.assert_close(gpu_sums, cpu_sums, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(gpu_grads, cpu_grads))
    assert positives or torch.equal(gpu_sums, torch.zeros(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_are_encoded_as_by_detectron2(dtype):
    anchors, boxes = random_boxes(200, 4).to(dtype), random_boxes(200, 5).to(dtype)
    weights = (10.0, 5.0, 3.0, 7.0)
    expected = Box2BoxTransform(weights).get_deltas(anchors, boxes)
    assert torch.equal(encode(anchors, boxes, weights), expected)


class RelativeL1(BoxLoss):
    """A row's loss depends on the other rows: their mean is subtracted."""

    def __call__(self, prediction, target):
        loss = (prediction - target).abs().sum(dim=1)
        return loss - loss.mean()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "loss, elementwise",
    [(SmoothL1(), True), (L1(), True), (GIoU(), False), (RelativeL1(), False)],
    ids=lambda x: x if isinstance(x, bool) else repr(x),
)
def test_only_elementwise_losses_are_computed_of_all_anchors(pretend, device, loss, elementwise):
    """And only on a GPU; other losses see the positive anchors alone."""
    seen = []
    R, positives = 9 * 6, [4, 20, 21]

    class Watched(type(loss)):
        def __call__(self, prediction, target):
            seen.append(len(prediction))
            return super().__call__(prediction, target)

    Watched.elementwise = vars(type(loss)).get("elementwise", False)
    watched = Watched.__new__(Watched)
    vars(watched).update(vars(loss))
    label_NR = torch.full((1, R), BACKGROUND, dtype=torch.int16)
    label_NR[0, positives] = 0
    targets = DenseTargets(label_NR, torch.zeros(1, R, dtype=torch.int64), random_boxes(1, 1))
    anchors = random_boxes(R, 2)
    with pretend(device, anchors):
        box_loss_sums(watched, TRANSFORM, anchors, [torch.zeros(1, 9 * 4, 2, 3)], targets)
    assert seen == [R if device == "cuda" and elementwise else len(positives)]
