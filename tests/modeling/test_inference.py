"""Candidates, order and edges of inference, against Detectron2's RetinaNet without its network.

Boxes outside the image: against torchvision's, too.
"""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.transform import resize_boxes

from retina_plugin.errors import ConfigError
from retina_plugin.modeling.inference import DenseInference, rescale_detections

K, A, SIZE = 8, 4, (96, 160)
# Each level has a multiple of 64 entries, so torch computes all sigmoids in full vectors. The rest
# behind the last full vector could differ from our sigmoids in the last bit.
LEVELS = [(12, 20), (6, 10), (4, 8)]
STRIDES = (8, 16, 32)
TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


def anchors_of(levels):
    generator = DefaultAnchorGenerator(
        sizes=[[16], [32], [64]], aspect_ratios=[[0.5, 0.8, 1.25, 2.0]], strides=STRIDES
    )
    return generator([torch.empty(1, 1, h, w) for h, w in levels])


@pytest.fixture(scope="module")
def anchors():
    return anchors_of(LEVELS)


def head_output(mean, num_images=2, dtype=torch.float32, channels_last=False, spread=0.2):
    torch.manual_seed(0)
    logits = [torch.randn(num_images, A * K, h, w) * 2 + mean for h, w in LEVELS]
    deltas = [torch.randn(num_images, A * 4, h, w) * spread for h, w in LEVELS]
    if channels_last:
        logits, deltas = (
            [x.contiguous(memory_format=torch.channels_last) for x in levels]
            for levels in (logits, deltas)
        )
    return [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas]


def detectron2(anchors, logits, deltas, **settings):
    model = RetinaNet.__new__(RetinaNet)
    torch.nn.Module.__init__(model)
    model.num_classes, model.box2box_transform = K, TRANSFORM
    model.test_score_thresh = settings.get("score_thresh", 0.05)
    model.test_topk_candidates = settings.get("topk_candidates", 1000)
    model.test_nms_thresh, model.max_detections_per_image = 0.5, 100
    model.anchor_generator = lambda features: anchors
    images = ImageList(torch.zeros(len(logits[0]), 3, *SIZE), [SIZE] * len(logits[0]))
    return model.forward_inference(images, [], [[x.clone() for x in logits], deltas])


def ours(anchors, logits, deltas, size=SIZE, **settings):
    inference = DenseInference(num_classes=K, box2box_transform=TRANSFORM, **settings)
    return inference(anchors, logits, deltas, [size] * len(logits[0]))


def assert_equal(got, expected):
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(got.pred_classes, expected.pred_classes)
    assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("topk", [1, 40, 1000])  # below and above the numbers of lines and entries
@pytest.mark.parametrize("score_thresh", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("mean", [-6.0, -1.0])
def test_detections_are_detectron2s_to_the_bit(anchors, mean, score_thresh, topk, channels_last):
    """Whatever share of the entries is above the threshold."""
    output = head_output(mean, channels_last=channels_last)
    settings = {"score_thresh": score_thresh, "topk_candidates": topk}
    for got, expected in zip(
        ours(anchors, *output, **settings), detectron2(anchors, *output, **settings)
    ):
        assert_equal(got, expected)


def test_nothing_above_the_threshold(anchors):
    """No detections, with the fields and shapes of some."""
    (got, _) = ours(anchors, *head_output(-40.0))
    assert len(got) == 0 and got.pred_boxes.tensor.shape == (0, 4)
    assert got.scores.dtype == torch.float32 and got.pred_classes.dtype == torch.int64


def test_equal_scores_are_in_the_order_of_the_anchors(anchors):
    """Scores that saturate at 1 are equal although their logits are not."""
    logits, deltas = head_output(-9.0, num_images=1)
    flat = logits[0].view(A, K, *LEVELS[0])
    # (anchor of the location, class, row, column), from the last to the first in anchor order
    entries = [(1, 3, 11, 2), (2, 0, 5, 19), (0, 6, 5, 19), (0, 2, 0, 0)]
    for logit, entry in zip((20.0, 30.0, 40.0, 50.0), entries):
        flat[entry] = logit
    deltas = [torch.zeros_like(x) for x in deltas]
    for topk in (2, 4):
        (got,) = ours(anchors, logits, deltas, topk_candidates=topk, score_thresh=0.9)
        assert got.scores.tolist() == [1.0] * topk
        assert got.pred_classes.tolist() == [2, 6, 0, 3][:topk]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_output_is_scored_and_suppressed_in_float32(anchors, dtype):
    """As if the head's numbers had been converted first."""
    logits, deltas = head_output(-3.0, dtype=dtype)
    as_float = ours(anchors, [x.float() for x in logits], [x.float() for x in deltas])
    for got, expected in zip(ours(anchors, logits, deltas), as_float):
        assert got.scores.dtype == got.pred_boxes.tensor.dtype == torch.float32
        assert torch.equal(got.scores, expected.scores)
        assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)


def best(logits, topk, score_thresh):
    """Scores of the candidates of one level by brute force: the highest above the threshold."""
    scores = logits.float().sigmoid().flatten()
    return scores[scores > score_thresh].sort(descending=True).values[:topk]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score_thresh", [0.01, 0.05, 0.3, 0.99999])
@pytest.mark.parametrize("topk", [1, 40, 1000])
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_candidate_is_lost_to_rounding(anchors, dtype, score_thresh, topk, channels_last):
    """16-bit logits are often equal to the threshold or to the k-th best."""
    inference = DenseInference(
        num_classes=K,
        box2box_transform=TRANSFORM,
        score_thresh=score_thresh,
        topk_candidates=topk,
        nms_thresh=1.0,
        max_detections=10**6,
    )
    for mean in (-4.6, -2.9, 9.0):
        logits, deltas = head_output(mean, num_images=1, dtype=dtype, channels_last=channels_last)
        logits[0][0, 1] = logits[0][0, 0]  # ties
        logits[0][0, 2] = 1.5
        for level in zip(anchors, logits, deltas):
            (got,) = inference(*([x] for x in level), [SIZE])
            assert torch.equal(got.scores, best(level[1][0], topk, score_thresh))


def test_nan_logits_do_not_hide_other_detections(anchors):
    """As in Detectron2: a NaN is no detection, and the others are found."""
    logits, deltas = head_output(-4.0)
    logits[0][:, 3, 2, 4] = torch.nan
    logits[1][:, :, 0, 0] = torch.nan
    for topk in (30, 1000):
        got = ours(anchors, logits, deltas, topk_candidates=topk)
        expected = detectron2(anchors, logits, deltas, topk_candidates=topk)
        assert all(torch.equal(g.scores, e.scores) for g, e in zip(got, expected))


def test_head_output_is_not_modified(anchors):
    logits, deltas = head_output(-1.0)
    before = [x.clone() for x in logits + deltas]
    ours(anchors, logits, deltas)
    assert all(torch.equal(x, y) for x, y in zip(logits + deltas, before))


def test_unknown_treatment_of_boxes_outside_raises():
    with pytest.raises(ConfigError, match="BOXES_OUTSIDE_TEST: unknown 'x'; known: drop, keep"):
        DenseInference(num_classes=K, box2box_transform=TRANSFORM, boxes_outside="x")


def test_dropped_boxes_outside_give_their_places_to_others(anchors):
    """Detectron2's detections come first; then those that boxes outside had kept out."""
    output = head_output(-3.0, spread=2.0)
    for got, kept in zip(
        ours(anchors, *output, boxes_outside="drop"), detectron2(anchors, *output)
    ):
        got, expected = detector_postprocess(got, *SIZE), detector_postprocess(kept, *SIZE)
        assert len(expected) < len(kept) == len(got) == 100  # the last are in the image, too
        assert_equal(got[: len(expected)], expected)


ALONE = (58, 75)  # padded to 64 x 96
LEVELS_ALONE = [(8, 12), (4, 6), (2, 3)]


def padded_output(seed, channels_last):
    """Head output of an image alone, and in the corner of a batch's with confident padding."""
    generator = torch.Generator().manual_seed(seed)
    alone, batch = [], []
    # logits and deltas; the boxes of the padding lie right and below of it
    away = torch.tensor([4.0, 4.0, -1.0, -1.0]).repeat(A)[:, None, None]
    for channels, mean, spread, padding in ((A * K, -2, 1, 4), (A * 4, 0, 0.3, away)):
        shapes = [(1, channels, *level) for level in LEVELS_ALONE]
        own = [torch.randn(shape, generator=generator) * spread + mean for shape in shapes]
        shapes = [(1, channels, *level) for level in LEVELS]
        whole = [torch.randn(shape, generator=generator) * 0.1 + padding for shape in shapes]
        for x, part in zip(whole, own):
            x[:, :, : part.shape[2], : part.shape[3]] = part
        if channels_last:
            whole = [x.contiguous(memory_format=torch.channels_last) for x in whole]
        alone.append(own)
        batch.append(whole)
    return alone, batch


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("topk, most", [(1, 100), (40, 100), (1000, 100), (1000, 10**6)])
def test_padding_of_a_batch_changes_no_detection(anchors, topk, most, channels_last):
    """However confident the head is there, and whichever limit is reached."""
    settings = {"topk_candidates": topk, "max_detections": most, "size": ALONE}
    alone, batch = padded_output(0, channels_last)
    own = anchors_of(LEVELS_ALONE)
    drop = {"boxes_outside": "drop", "strides": STRIDES, "size_divisibility": 32, **settings}
    (expected,), (got,) = ours(own, *alone, **drop), ours(anchors, *batch, **drop)
    assert len(expected) > 1
    assert_equal(got, expected)
    # Detectron2's, of which few or none are left
    (kept,), (kept_alone,) = ours(anchors, *batch, **settings), ours(own, *alone, **settings)
    left, left_alone = (len(detector_postprocess(x, *ALONE)) for x in (kept, kept_alone))
    assert left < left_alone <= len(expected)


def torchvision(anchors, logits, deltas, size):
    """torchvision's model without its network; boxes rescaled to twice the size."""
    model = TorchvisionRetinaNet.__new__(TorchvisionRetinaNet)
    torch.nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh = 0.05, 0.5
    model.topk_candidates, model.detections_per_img = 1000, 100
    model.box_coder = torchvision_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    outputs = {
        "cls_logits": [permute_to_N_HWA_K(x, K) for x in logits],
        "bbox_regression": [permute_to_N_HWA_K(x, 4) for x in deltas],
    }
    boxes = [[a.tensor for a in anchors]] * len(logits[0])
    return model.postprocess_detections(outputs, boxes, [size] * len(logits[0]))


@pytest.mark.parametrize("size", [SIZE, (61, 83)])
def test_clipped_boxes_are_torchvisions_to_the_bit(anchors, size):
    """Before and after rescaling, boxes without area included."""
    output = head_output(-3.0, spread=2.0)
    found = ours(anchors, *output, size=size, boxes_outside="clip")
    for got, expected in zip(found, torchvision(anchors, *output, size)):
        for height, width in (size, (197, 211)):
            scaled = rescale_detections(got, height, width)
            boxes = resize_boxes(expected["boxes"], size, (height, width))
            assert scaled.image_size == (height, width)
            assert torch.equal(scaled.pred_boxes.tensor, boxes)
            assert torch.equal(scaled.scores, expected["scores"])
            assert torch.equal(scaled.pred_classes, expected["labels"])
        assert torch.equal(got.pred_boxes.tensor, expected["boxes"])  # not changed by the scaling
        assert not got.pred_boxes.nonempty().all()


def test_boxes_without_candidates_are_treated_too(anchors):
    for boxes_outside in ("keep", "drop", "clip"):
        (got, _) = ours(anchors, *head_output(-40.0), boxes_outside=boxes_outside)
        assert len(rescale_detections(got, 10, 10)) == 0
        assert isinstance(got.pred_boxes, Boxes) and got.pred_boxes.tensor.shape == (0, 4)
