"""Anchor samplers: OHEM against one NMS over all anchors."""

import pytest
import torch
from detectron2.config import get_cfg
from torchvision.ops import box_iou, nms

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import BACKGROUND, IGNORED, DenseTargets
from retina_plugin.modeling import ANCHOR_SAMPLER_REGISTRY, OHEM, AllAnchors, sampling

R = 600


def scene(seed, num_positive=20, num_ignored=30):
    """Targets of two images, scores of all anchors, predicted boxes that overlap a lot."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, R, 4, generator=generator) * 60
    boxes[..., 2:] = boxes[..., :2] + 10 + boxes[..., 2:] / 2
    score = (torch.rand(2, R, generator=generator) * 40).round()  # rounded: many are equal
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


def untrimmed(score, boxes, thresh):
    """Greedy NMS over every anchor that is not ignored, hardest first."""
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] > -torch.inf]
    rank = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return order[nms(boxes[order], rank, thresh)]


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
@pytest.mark.parametrize("batch_size", [8, 50, 10_000])
@pytest.mark.parametrize("thresh", [0.5, 0.7])
def test_ohem_is_the_top_of_one_nms_over_all_anchors(monkeypatch, block, batch_size, thresh):
    monkeypatch.setattr(sampling, "_BLOCK", block)
    targets, score, boxes = scene(seed=batch_size)
    for n, chosen in enumerate(sample(OHEM(batch_size, thresh), targets, score, boxes)):
        expected = untrimmed(score[n], boxes[n], thresh)
        assert torch.equal(chosen, expected[:batch_size])
        assert len(expected) < R - 100  # the NMS has something to do


@pytest.mark.parametrize("block", [1, 64, 1024])
@pytest.mark.parametrize("batch_size", [8, 40])
def test_ohem_1_to_3_takes_the_hardest_of_both_kinds(monkeypatch, block, batch_size):
    monkeypatch.setattr(sampling, "_BLOCK", block)
    targets, score, boxes = scene(seed=1)
    chosen = sample(OHEM(batch_size, 0.5, 0.25), targets, score, boxes)[0]
    survivors = untrimmed(score[0], boxes[0], 0.5)
    positive = torch.isin(survivors, targets.positive_anchor)
    assert positive.sum() >= 3
    expected_positives = survivors[positive][: batch_size // 4]
    expected_negatives = survivors[~positive][: batch_size - len(expected_positives)]
    assert torch.equal(chosen, torch.cat([expected_positives, expected_negatives]))
    assert 3 * len(expected_positives) <= len(expected_negatives)


def test_ohem_1_to_3_waits_for_a_positive_of_low_score():
    """The one positive scores lowest of all and is still in the batch."""
    targets, score, boxes = scene(seed=2, num_positive=1, num_ignored=0)
    (anchor,) = targets.positive_anchor.tolist()
    score[0, anchor] = -5.0
    boxes[0, anchor] = torch.tensor([500.0, 500, 520, 520])
    assert sample(OHEM(8, 0.5, 0.25), targets, score, boxes)[0].tolist()[0] == anchor
    assert anchor not in sample(OHEM(8, 0.5), targets, score, boxes)[0]


def test_memory_is_bounded_however_deep_the_last_positive_is(monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCK", 50)
    monkeypatch.setattr(sampling, "_SURVIVORS", 20)
    compared = []
    monkeypatch.setattr(
        sampling, "box_iou", lambda a, b: compared.append((len(a), len(b))) or box_iou(a, b)
    )
    targets, score, boxes = scene(seed=6, num_positive=1, num_ignored=0)
    score[0, targets.positive_anchor] = -5.0
    chosen = sample(OHEM(8, 0.5, 0.25), targets, score, boxes)[0]
    monkeypatch.undo()
    assert torch.equal(chosen, sample(OHEM(8, 0.5, 0.25), targets, score, boxes)[0])
    assert sum(b for _, b in compared) > 100
    assert max(a for a, _ in compared) <= 50 and max(b for _, b in compared) <= 20


def test_chosen_boxes_do_not_overlap_and_ignored_anchors_are_left_out():
    targets, score, boxes = scene(seed=3)
    (chosen, _) = sample(OHEM(64, 0.5), targets, score, boxes)
    overlap = box_iou(boxes[0, chosen], boxes[0, chosen]).fill_diagonal_(0)
    assert overlap.max() <= 0.5
    assert not torch.isin(chosen, targets.ignored_anchor).any()


def test_everything_ignored_chooses_nothing():
    targets, score, boxes = scene(seed=4)
    chosen = sample(OHEM(64), targets, torch.full_like(score, -torch.inf), boxes)
    assert [len(c) for c in chosen] == [0, 0]


def test_blocks_end_as_soon_as_the_batch_is_full(monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCK", 50)
    targets, score, boxes = scene(seed=5)
    decoded = []

    def predict(n, anchor):
        decoded.append(len(anchor))
        return boxes[n, anchor]

    OHEM(8, 0.7)(targets, score.clone, predict)
    assert sum(decoded) == 2 * 50


def test_all_anchors_chooses_none():
    sampler = ANCHOR_SAMPLER_REGISTRY.build(add_retina_config(get_cfg()))
    assert isinstance(sampler, AllAnchors)
    assert sampler(None, None, None) is None


def test_config_keys():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.SAMPLER = "OHEM"
    cfg.merge_from_list(["MODEL.RETINANET.OHEM.POSITIVE_FRACTION", "0.25"])
    sampler = ANCHOR_SAMPLER_REGISTRY.build(cfg)
    assert vars(sampler) == {"batch_size": 128, "nms_thresh": 0.5, "positive_fraction": 0.25}


@pytest.mark.parametrize(
    "settings, key", [((0,), "BATCH_SIZE"), ((8, 2.0), "NMS_THRESH"), ((8, 0.5, 0), "FRACTION")]
)
def test_impossible_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        OHEM(*settings)


def test_unknown_sampler_lists_the_known_ones():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.SAMPLER = "Random"
    with pytest.raises(ConfigError, match="SAMPLER.*'Random'.*AllAnchors, OHEM"):
        ANCHOR_SAMPLER_REGISTRY.build(cfg)
