"""Anchor samplers: OHEM against one NMS over all anchors."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling.box_regression import Box2BoxTransform
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou, nms

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses import CrossEntropy
from retina_plugin.losses.targets import BACKGROUND, IGNORED, DenseTargets
from retina_plugin.modeling import ANCHOR_SAMPLER_REGISTRY, OHEM, AllAnchors, Sample
from retina_plugin.modeling.classification import cls_loss_sums

R = 4000  # more than OHEM looks at in one step


def scene(seed, num_positive=20, num_ignored=30):
    """Targets of two images, scores of all anchors, predicted boxes that overlap a lot."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, R, 4, generator=generator) * 120
    boxes[..., 2:] = boxes[..., :2] + 10 + boxes[..., 2:] / 4
    score = (torch.rand(2, R, generator=generator) * 200).round()  # rounded: many are equal
    chosen = torch.randperm(R, generator=generator)[: num_positive + num_ignored]
    positive, ignored = chosen[:num_positive], chosen[num_positive:]
    label = torch.full((2, R), BACKGROUND, dtype=torch.int16)
    label[0, positive], label[0, ignored] = 0, IGNORED
    targets = DenseTargets(label, torch.zeros(2, R, dtype=torch.int64), torch.zeros(1, 4))
    score[0, ignored] = -torch.inf
    return targets, score, boxes


def sample(sampler, targets, score, boxes):
    chosen = sampler(targets, score.clone, lambda n, anchor: boxes[n, anchor])
    return [chosen.anchor[chosen.image == n] for n in range(targets.num_images)]


def nms_over_all(score, boxes, thresh):
    """Greedy NMS over every anchor that is not ignored, hardest first."""
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] > -torch.inf]
    rank = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return order[nms(boxes[order], rank, thresh)]


@pytest.mark.parametrize("batch_size", [8, 50, 300, 10_000])
@pytest.mark.parametrize("thresh", [0.5, 0.7])
def test_ohem_is_the_top_of_one_nms_over_all_anchors(batch_size, thresh):
    targets, score, boxes = scene(seed=batch_size)
    for n, chosen in enumerate(sample(OHEM(batch_size, thresh), targets, score, boxes)):
        expected = nms_over_all(score[n], boxes[n], thresh)
        assert torch.equal(chosen, expected[:batch_size])
        assert 300 < len(expected) < R - 1000  # the NMS has something to do


@pytest.mark.parametrize("batch_size", [8, 40])
def test_ohem_1_to_3_takes_the_hardest_of_both_kinds(batch_size):
    targets, score, boxes = scene(seed=1, num_positive=200)
    chosen = sample(OHEM(batch_size, 0.5, 0.25), targets, score, boxes)[0]
    survivors = nms_over_all(score[0], boxes[0], 0.5)
    positive = torch.isin(survivors, targets.positive_anchor)
    assert positive.sum() >= 3
    expected_positives = survivors[positive][: batch_size // 4]
    expected_negatives = survivors[~positive][: batch_size - len(expected_positives)]
    assert torch.equal(chosen, torch.cat([expected_positives, expected_negatives]))
    assert 3 * len(expected_positives) <= len(expected_negatives)


def test_ohem_1_to_3_finds_a_positive_of_low_score():
    """The only positive has the lowest score of all and is still in the batch."""
    targets, score, boxes = scene(seed=2, num_positive=1, num_ignored=0)
    (anchor,) = targets.positive_anchor.tolist()
    score[0, anchor] = -5.0
    boxes[0, anchor] = torch.tensor([500.0, 500, 520, 520])
    assert sample(OHEM(8, 0.5, 0.25), targets, score, boxes)[0].tolist()[0] == anchor
    assert anchor not in sample(OHEM(8, 0.5), targets, score, boxes)[0]


class Largest(TorchDispatchMode):
    """The number of elements of the largest result."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_memory_is_bounded_if_the_last_positive_is_deep():
    """11,236 boxes that do not overlap, and the only positive has the lowest score."""
    place = torch.arange(106.0) * 10
    corner = torch.cartesian_prod(place, place)
    boxes = torch.cat([corner, corner + 9], dim=1)
    label = torch.full((1, len(boxes)), BACKGROUND, dtype=torch.int16)
    label[0, -1] = 0
    targets = DenseTargets(label, torch.zeros_like(label, dtype=torch.int64), boxes[:1])
    score = -torch.arange(float(len(boxes)))[None]
    with Largest() as watch:
        (chosen,) = sample(OHEM(8, 0.5, 0.25), targets, score, boxes[None])
    assert chosen.tolist() == [len(boxes) - 1, 0, 1, 2, 3, 4, 5, 6]
    assert watch.largest <= 2**24


def test_chosen_boxes_do_not_overlap_and_ignored_anchors_are_left_out():
    targets, score, boxes = scene(seed=3)
    (chosen, _) = sample(OHEM(64, 0.5), targets, score, boxes)
    overlap = box_iou(boxes[0, chosen], boxes[0, chosen]).fill_diagonal_(0)
    assert overlap.max() <= 0.5
    assert not torch.isin(chosen, targets.ignored_anchor).any()


def test_ignored_anchors_give_an_empty_sample():
    targets, score, boxes = scene(seed=4)
    chosen = sample(OHEM(64), targets, torch.full_like(score, -torch.inf), boxes)
    assert [len(c) for c in chosen] == [0, 0]


def test_nms_ends_when_the_batch_is_full():
    """The boxes of most anchors are not even decoded."""
    targets, score, boxes = scene(seed=5)
    decoded = []

    def predict(n, anchor):
        decoded.append(len(anchor))
        return boxes[n, anchor]

    OHEM(8, 0.7)(targets, score.clone, predict)
    assert sum(decoded) < 2 * R / 3


def test_all_anchors_takes_no_sample():
    sampler = ANCHOR_SAMPLER_REGISTRY.build(add_retina_config(get_cfg()))
    assert isinstance(sampler, AllAnchors)
    assert sampler(None, None, None) is None


def test_a_sampler_of_your_own_may_be_a_function():
    """Here the detector's classification loss is that of the first anchor of each image."""
    torch.manual_seed(0)
    N, A, K = 2, 3, 5
    logits = [torch.randn(N, A * K, 2, 2)]
    label = torch.full((N, 12), BACKGROUND, dtype=torch.int16)
    targets = DenseTargets(label, torch.zeros(N, 12, dtype=torch.int64), torch.zeros(1, 4))

    def first(targets, score_anchors, predict_boxes):
        assert score_anchors().shape == (N, 12)
        assert predict_boxes(1, torch.tensor([3, 4])).shape == (2, 4)
        return Sample(torch.arange(N), torch.zeros(N, dtype=torch.int64))

    sums, divisor_N = cls_loss_sums(
        CrossEntropy(),
        first,
        Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        torch.tensor([[0.0, 0, 8, 8]]).repeat(12, 1),
        logits,
        [torch.zeros(N, A * 4, 2, 2)],
        targets,
        torch.ones(N),
        num_classes=K,
    )
    expected = F.softplus(logits[0][:, :K, 0, 0]).sum(dim=1)
    torch.testing.assert_close(sums.total, expected)
    assert divisor_N.tolist() == [N, N]  # one anchor, N images


def test_config_keys():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.SAMPLER = "OHEM"
    cfg.merge_from_list(["MODEL.RETINANET.OHEM.POSITIVE_FRACTION", "0.25"])
    sampler = ANCHOR_SAMPLER_REGISTRY.build(cfg)
    assert vars(sampler) == {"batch_size": 128, "nms_thresh": 0.5, "positive_fraction": 0.25}


@pytest.mark.parametrize(
    "settings, key", [((0,), "BATCH_SIZE"), ((8, 2.0), "NMS_THRESH"), ((8, 0.5, 0), "FRACTION")]
)
def test_invalid_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        OHEM(*settings)


def test_unknown_sampler_raises():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.SAMPLER = "Random"
    with pytest.raises(ConfigError, match="SAMPLER.*'Random'.*AllAnchors, OHEM"):
        ANCHOR_SAMPLER_REGISTRY.build(cfg)
