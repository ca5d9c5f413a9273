"""Matcher and labeler against loops over anchors and boxes."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from hypothesis import strategies as st

from retina_plugin.config import KEYS
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher
from tests.fuzz.counting import fuzz
from tests.fuzz.strategies import THRESHOLDS, boxes, rows_of_four

CODES = {1: 0, 0: BACKGROUND, -1: IGNORED}
MODES = st.sampled_from(KEYS["MODEL.RETINANET.LOW_QUALITY_MATCHES"].choices)


@st.composite
def matcher_settings(draw):
    thresholds = sorted(draw(st.lists(THRESHOLDS, min_size=1, max_size=3)))
    labels = [draw(st.sampled_from([0, -1]))]
    labels += [draw(st.sampled_from([0, -1, 1])) for _ in thresholds]
    return thresholds, labels, draw(MODES)


def naive_match(gt_G4, anchors_R4, thresholds, labels, low_quality):
    """Index and label of each anchor; the IoUs are Detectron2's."""
    iou_GR = pairwise_iou(Boxes(gt_G4), Boxes(anchors_R4)).tolist()
    best_of_box = [max(row, default=0.0) for row in iou_GR]
    index, label = [], []
    for r in range(len(anchors_R4)):
        column = [row[r] for row in iou_GR]
        best = max(column, default=0.0)
        index.append(column.index(best) if column else 0)
        interval = sum(best >= float(np.float32(t)) for t in thresholds)
        code = CODES[labels[interval]]
        is_best_of_a_box = any(v == b > 0 for v, b in zip(column, best_of_box))
        high_enough = low_quality == "always" or best >= float(np.float32(thresholds[0]))
        if low_quality != "never" and is_best_of_a_box and high_enough:
            code = 0
        label.append(code)
    return index, label


@fuzz(20, gt=rows_of_four((0, 6)) | boxes((0, 6)), anchors=boxes((0, 12)), how=matcher_settings())
def test_matches_are_those_of_a_loop(gt, anchors, how):
    """Whatever the ground truth holds: NaN, infinities, swapped corners, ties."""
    matches = AnchorMatcher(*how)(gt, anchors)
    index, label = naive_match(gt, anchors, *how)
    assert matches.gt.tolist() == index
    assert matches.label.tolist() == label


@fuzz(3, seed=st.integers(0, 2**31), num_boxes=st.integers(1, 300), how=matcher_settings())
def test_matches_of_many_anchors_do_not_depend_on_pieces(seed, num_boxes, how):
    """Enough anchors and boxes for the code that splits them; the whole matrix decides."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 400, (num_boxes + 9000, 2), generator=generator)
    side = torch.randint(0, 60, (num_boxes + 9000, 2), generator=generator)
    rows = torch.cat([corner, corner + side], dim=1).float()
    gt, anchors = rows[:num_boxes], rows[num_boxes:]
    thresholds, labels, low_quality = how
    iou_GR = pairwise_iou(Boxes(gt), Boxes(anchors))
    best_R, index_R = iou_GR.max(dim=0)
    codes = torch.tensor([CODES[label] for label in labels])
    label_R = codes[sum((best_R >= t).long() for t in thresholds)]
    if low_quality != "never":
        highest_G1 = iou_GR.amax(dim=1, keepdim=True)
        promoted_R = ((iou_GR == highest_G1) & (highest_G1 > 0)).any(dim=0)
        if low_quality == "above_background":
            promoted_R &= best_R >= thresholds[0]
        label_R[promoted_R] = 0
    matches = AnchorMatcher(*how)(gt, anchors)
    assert torch.equal(matches.gt, index_R)
    assert torch.equal(matches.label.long(), label_R)


@st.composite
def images(draw, num_classes):
    """One to three images with objects and crowds."""
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        gt = draw(boxes((0, 6)) | rows_of_four((0, 4)))
        image = Instances((64, 64), gt_boxes=Boxes(gt))
        number = {"min_size": len(gt), "max_size": len(gt)}
        classes = draw(st.lists(st.integers(0, num_classes - 1), **number))
        image.gt_classes = torch.tensor(classes, dtype=torch.int64)
        image.gt_iscrowd = torch.tensor(draw(st.lists(st.booleans(), **number)), dtype=torch.bool)
        batch.append(image)
    return batch


@st.composite
def labelings(draw):
    num_classes = draw(st.sampled_from([1, 2, 80, 32767]))
    return num_classes, draw(images(num_classes)), draw(st.none() | THRESHOLDS)


@fuzz(15, anchors=boxes((1, 10)), labeling=labelings(), how=matcher_settings())
def test_targets_are_those_of_a_loop(anchors, labeling, how):
    """Labels, assigned boxes and ignored anchors of each image, with crowds left out."""
    num_classes, batch, iof_thresh = labeling
    targets = AnchorLabeler(AnchorMatcher(*how), num_classes, iof_thresh)(anchors, batch)
    for n, image in enumerate(batch):
        crowd_G = image.gt_iscrowd
        gt, crowds = image.gt_boxes.tensor[~crowd_G], image.gt_boxes.tensor[crowd_G]
        classes = image.gt_classes[~crowd_G].tolist()
        index, label = naive_match(gt, anchors, *how)
        expected = [classes[i] if code == 0 else code for i, code in zip(index, label)]
        if not len(gt):  # as in Detectron2, whatever the label of the lowest interval
            expected = [BACKGROUND] * len(anchors)
        if iof_thresh is not None:
            for r, anchor in enumerate(anchors):
                if expected[r] == BACKGROUND and in_a_crowd(anchor, crowds, iof_thresh):
                    expected[r] = IGNORED
        assert targets.label_NR[n].tolist() == expected
        for r in (r for r, code in enumerate(label) if code == 0):
            assigned = targets.gt_boxes_G4[targets.gt_NR[n, r]]
            assert torch.equal(assigned, gt[index[r]])


def in_a_crowd(anchor, crowds, threshold):
    """Whether the share of the anchor's area that lies in one of the boxes is high enough."""
    x1, y1, x2, y2 = anchor.numpy()
    area = (x2 - x1) * (y2 - y1)
    for cx1, cy1, cx2, cy2 in crowds.numpy():
        if np.isnan([cx1, cy1, cx2, cy2]).any():
            continue  # nothing lies in a box that is none
        width = max(min(x2, cx2) - max(x1, cx1), np.float32(0))
        height = max(min(y2, cy2) - max(y1, cy1), np.float32(0))
        if area > 0 and width * height / area >= np.float32(threshold):
            return True
    return False
