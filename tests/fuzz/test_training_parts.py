"""Hard example mining, normaliser, box coder and box losses against loops and formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from retina_plugin.losses import DenseTargets
from retina_plugin.losses.regression import L1, CIoU, DIoU, GIoU, SmoothL1
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling.box_regression import BoxTransform, box_loss_sums
from retina_plugin.modeling.normalizer import LossNormalizer
from retina_plugin.modeling.sampling import OHEM
from tests.fuzz.counting import fuzz
from tests.fuzz.strategies import THRESHOLDS, boxes, generators, pick, random_boxes


def targets_of(label_NR):
    return DenseTargets(label_NR.short(), torch.zeros_like(label_NR).long(), torch.zeros(1, 4))


def overlaps(boxes_R4, threshold):
    """(R, R) whether the IoU, computed in float32, is above the threshold."""
    a = boxes_R4.numpy()
    area = (a[:, 2:] - a[:, :2]).prod(axis=1)
    low, high = np.maximum(a[:, None, :2], a[:, :2]), np.minimum(a[:, None, 2:], a[:, 2:])
    both = (high - low).clip(min=0).prod(axis=2)
    with np.errstate(invalid="ignore"):  # two boxes without area: NaN, above nothing
        return (both / (area[:, None] + area - both)).astype(np.float64) > threshold


def naive_ohem(scores, labels, boxes_R4, batch_size, nms_thresh, positive_fraction):
    """Chosen anchors of one image: sort, drop overlapping ones, take the first."""
    above_RR = overlaps(boxes_R4, nms_thresh)
    order = sorted((r for r, s in enumerate(scores) if s > -math.inf), key=lambda r: -scores[r])
    kept, dropped_R = [], np.zeros(len(scores), dtype=bool)
    for r in order:
        if not dropped_R[r]:
            kept.append(r)
            dropped_R |= above_RR[r]
    if positive_fraction is None:
        return kept[:batch_size]
    positives = [r for r in kept if labels[r] >= 0][: int(batch_size * positive_fraction)]
    negatives = [r for r in kept if labels[r] < 0][: batch_size - len(positives)]
    return positives + negatives


@st.composite
def minings(draw):
    """Two images: scores with ties, labels, integer boxes."""
    generator, R = draw(generators()), draw(st.integers(1, 60))
    labels = pick(generator, [BACKGROUND] * 3 + [IGNORED, 0, 1], 2, R)
    scores = pick(generator, [0.0, 0.1, 0.5, 1.0, 3.0, 80.0], 2, R)
    if draw(st.booleans()):
        scores = scores + torch.rand(2, R, generator=generator)
    scores[labels == IGNORED] = -math.inf
    predicted = [random_boxes(generator, R, 0, 20) for _ in range(2)]
    settings = (
        draw(st.sampled_from([1, 2, 3, 8, 64])),
        draw(THRESHOLDS | st.just(0.0)),
        draw(st.none() | st.sampled_from([0.1, 0.25, 0.5, 1.0])),
    )
    return labels, scores, predicted, settings


@fuzz(15, mining=minings())
def test_hard_anchors_are_those_of_a_loop(mining):
    """Greedy NMS of all anchors, then the first ones; none of them ignored."""
    labels, scores, predicted, settings = mining
    sample = OHEM(*settings)(
        targets_of(labels),
        lambda: scores,
        lambda n, anchor_S: predicted[n][anchor_S],
    )
    for n in range(2):
        expected = naive_ohem(scores[n].tolist(), labels[n].tolist(), predicted[n], *settings)
        assert sample.anchor[sample.image == n].tolist() == expected


@fuzz(1, generator=generators(), thresh=THRESHOLDS, fraction=st.none() | st.just(0.25))
def test_hard_anchors_of_several_blocks_are_those_of_a_loop(generator, thresh, fraction):
    """More anchors than the sampler looks at in one step."""
    R = 1300
    corner = torch.randint(0, 24, (R, 2), generator=generator)
    side = torch.randint(1, 12, (R, 2), generator=generator)
    boxes_R4 = torch.cat([corner, corner + side], dim=1).float()
    scores = torch.randint(0, 50, (R,), generator=generator).float()
    labels = torch.randint(-12, 2, (R,), generator=generator).clamp(min=BACKGROUND)
    sample = OHEM(200, thresh, fraction)(
        targets_of(labels[None]), lambda: scores[None], lambda n, anchor_S: boxes_R4[anchor_S]
    )
    expected = naive_ohem(scores.tolist(), labels.tolist(), boxes_R4, 200, thresh, fraction)
    assert sample.anchor.tolist() == expected


@fuzz(10, counts=st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=8), max_size=5))
def test_divisors_are_those_of_the_formula(counts):
    """Of each mode, step after step; never 0."""
    modules = {m: LossNormalizer(m, 0.9, 100.0) for m in ("per_image", "per_gpu", "global", "ema")}
    ema = 100.0
    for numbers in counts:
        total, N = sum(numbers), len(numbers)
        ema = 0.9 * ema + 0.1 * max(total, 1)
        expected = {
            "per_image": [max(n, 1) * N for n in numbers],
            "per_gpu": [total + N] * N,
            "global": [max(total, 1)] * N,
            "ema": [ema] * N,
        }
        for mode, module in modules.items():
            got = module(torch.tensor(numbers))
            assert got.dtype == torch.float32 and (got > 0).all()
            np.testing.assert_allclose(got.numpy(), expected[mode], rtol=1e-5)


SIDED = boxes((1, 12), st.integers(0, 60)).map(lambda b: b + torch.tensor([0.0, 0, 1, 1]))
DELTA = st.floats(-4, 4, width=32) | st.sampled_from([1e3, -1e3, 1e6, 88.0, -88.0, 1e-30])


@fuzz(10, anchors=SIDED, data=st.data())
def test_huge_deltas_are_clamped(anchors, data):
    """A box is at most 62.5 times its anchor, and finite; in the range it is the inverse."""
    flat = data.draw(st.lists(DELTA, min_size=anchors.numel(), max_size=anchors.numel()))
    deltas, coder = torch.tensor(flat).view_as(anchors), BoxTransform((1.0, 1.0, 1.0, 1.0))
    decoded = coder.apply_deltas(deltas, anchors)
    assert decoded.isfinite().all()
    size = anchors[:, 2:] - anchors[:, :2]
    # the corners round: at a centre of 60 million, to 4 pixels
    rounding = decoded.abs().amax() * 2.4e-7
    assert ((decoded[:, 2:] - decoded[:, :2]) <= size * 62.5 * 1.00001 + rounding).all()
    near = (deltas.abs() <= 4).all(dim=1)
    again = coder.get_deltas(anchors[near], decoded[near])
    torch.testing.assert_close(again, deltas[near], rtol=1e-3, atol=2e-3)


def formula(loss, anchor, delta, box):
    """The loss of one anchor, in float64."""
    ax, ay, bx, by = *(anchor[:2] + anchor[2:]) / 2, *(box[:2] + box[2:]) / 2
    (aw, ah), (bw, bh) = anchor[2:] - anchor[:2], box[2:] - box[:2]
    if loss.on == "deltas":
        target = np.array([(bx - ax) / aw, (by - ay) / ah, np.log(bw / aw), np.log(bh / ah)])
        d = np.abs(delta - target)
        beta = getattr(loss, "beta", 0.0)
        return np.where(d < beta, 0.5 * d**2 / max(beta, 1e-30), d - 0.5 * beta).sum()
    limit = math.log(1000 / 16)
    px, py = ax + delta[0] * aw, ay + delta[1] * ah
    pw, ph = aw * np.exp(min(delta[2], limit)), ah * np.exp(min(delta[3], limit))
    p = np.array([px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2])
    inner = np.clip(np.minimum(p[2:], box[2:]) - np.maximum(p[:2], box[:2]), 0, None).prod()
    union = pw * ph + bw * bh - inner
    outer = np.maximum(p[2:], box[2:]) - np.minimum(p[:2], box[:2])
    overlap = inner / union
    if isinstance(loss, GIoU):
        return 1 - overlap + (outer.prod() - union) / outer.prod()
    distance = ((px - bx) ** 2 + (py - by) ** 2) / (outer**2).sum()
    if isinstance(loss, DIoU):
        return 1 - overlap + distance
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(pw / ph)) ** 2
    return 1 - overlap + distance + v**2 / (1 - overlap + v + 1e-12)


@pytest.mark.parametrize(
    "loss", [SmoothL1(0.1), SmoothL1(0.0), L1(), GIoU(), DIoU(), CIoU()], ids=repr
)
@fuzz(4, data=st.data())
def test_box_losses_are_those_of_the_formula(loss, data):
    """Summed over the positive anchors of each image; nothing else counts, not even NaN."""
    N, A, sizes = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), [(3, 2), (1, 1)]
    R = 7 * A
    generator = data.draw(generators())
    anchors = random_boxes(generator, R, 0, 40, side=3)
    gt = random_boxes(generator, data.draw(st.integers(1, 4)), 0, 40, side=2)
    label_NR = torch.randint(-3, 2, (N, R), generator=generator).clamp(min=IGNORED)
    gt_NR = torch.randint(0, len(gt), (N, R), generator=generator)
    delta_NR4 = torch.randn(N, R, 4, generator=generator) * data.draw(st.sampled_from([0.1, 1.0]))
    delta_NR4[label_NR < 0] = data.draw(st.sampled_from([0.0, math.nan, math.inf]))
    levels, start = [], 0
    for h, w in sizes:
        part = delta_NR4[:, start : start + h * w * A]
        levels.append(part.reshape(N, h, w, A * 4).permute(0, 3, 1, 2).requires_grad_())
        start += h * w * A
    targets = DenseTargets(label_NR.short(), gt_NR, gt)
    coder = BoxTransform((1.0, 1.0, 1.0, 1.0))
    sums_N = box_loss_sums(loss, coder, anchors, levels, targets)
    gradients = torch.autograd.grad(sums_N.sum(), levels)
    assert all(g.isfinite().all() for g in gradients)
    for n in range(N):
        expected = sum(
            formula(
                loss, *(x.double().numpy() for x in (anchors[r], delta_NR4[n, r], gt[gt_NR[n, r]]))
            )
            for r in range(R)
            if label_NR[n, r] >= 0
        )
        assert math.isclose(sums_N[n].item(), expected, rel_tol=2e-4, abs_tol=2e-5)
