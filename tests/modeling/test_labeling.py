"""Dense targets of a batch."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
BOXES = [
    torch.tensor([[20.0, 0, 30, 10], [40, 0, 50, 4.5]]),  # positive; between the thresholds
    torch.zeros(0, 4),
    torch.tensor([[60.0, 0, 70, 9]]),
]
CLASSES = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([0])]
NO_BOXES, NO_CLASSES = [BOXES[1]], [CLASSES[1]]


def labeler(low_quality="never", num_classes=4, **settings):
    matcher = AnchorMatcher([0.4, 0.5], [0, -1, 1], low_quality)
    return AnchorLabeler(matcher, num_classes, **settings)


def ground_truth(boxes, classes, crowds=None):
    """Instances of each image. Crowd boxes come first and have a class that does not exist."""
    batch = []
    for n, (boxes_G4, classes_G) in enumerate(zip(boxes, classes, strict=True)):
        instances = Instances((100, 100), gt_boxes=Boxes(boxes_G4), gt_classes=classes_G)
        if crowds is not None:
            C = len(crowds[n])
            instances = Instances((100, 100), gt_boxes=Boxes(torch.cat([crowds[n], boxes_G4])))
            instances.gt_classes = torch.cat([torch.full((C,), 99), classes_G])
            instances.gt_iscrowd = torch.arange(len(instances)) < C
        batch.append(instances)
    return batch


def random_boxes(n, seed, size=96):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=generator) * size * 0.4
    return torch.cat([corner, corner + side], dim=1)


def test_positives_and_ignored_by_image():
    targets = labeler()(ANCHORS, ground_truth(BOXES, CLASSES))
    assert targets.num_images == 3
    assert targets.positive_image.tolist() == [0, 2]
    assert targets.positive_anchor.tolist() == [1, 3]
    assert targets.positive_class.tolist() == [3, 0]
    assert torch.equal(targets.positive_gt_box, torch.cat([BOXES[0][:1], BOXES[2]]))
    assert targets.ignored_image.tolist() == [0] and targets.ignored_anchor.tolist() == [2]
    assert targets.num_positives_N().tolist() == [1, 0, 1]


def test_targets_are_the_matches_of_each_image():
    anchors = random_boxes(300, 0)
    boxes = [random_boxes(n, n) for n in (5, 0, 20, 1)]
    classes = [torch.arange(len(b)) % 4 for b in boxes]
    targets = labeler("always")(anchors, ground_truth(boxes, classes))
    for n in range(len(boxes)):
        gt, label = labeler("always").matcher(boxes[n], anchors)
        of_image, ignored = targets.positive_image == n, targets.ignored_image == n
        positive = torch.where(label == 0)[0]
        assert torch.equal(targets.positive_anchor[of_image], positive)
        assert torch.equal(targets.positive_class[of_image], classes[n][gt[positive]])
        assert torch.equal(targets.positive_gt_box[of_image], boxes[n][gt[positive]])
        assert torch.equal(targets.ignored_anchor[ignored], torch.where(label == IGNORED)[0])
    assert (targets.positive_image.diff() >= 0).all() and (targets.ignored_image.diff() >= 0).all()


def test_images_without_boxes_have_only_background():
    targets = labeler("always")(ANCHORS, ground_truth(NO_BOXES * 2, NO_CLASSES * 2))
    assert (targets.label_NR == BACKGROUND).all()
    assert targets.num_positives_N().tolist() == [0, 0]


@pytest.mark.parametrize("thresh", [None, 0.5])
def test_images_with_crowds_only_are_background_outside_the_crowds(thresh):
    """Whatever the label of anchors that no box overlaps."""
    crowds = [torch.tensor([[15.0, -5, 35, 15]]), BOXES[1]]  # over the second anchor; none
    labels = AnchorLabeler(AnchorMatcher([0.1, 0.4, 0.5], [-1, 0, -1, 1]), 4, thresh)(
        ANCHORS, ground_truth(NO_BOXES * 2, NO_CLASSES * 2, crowds)
    ).label_NR
    expected = torch.full((2, len(ANCHORS)), BACKGROUND)
    if thresh is not None:
        expected[0, 1] = IGNORED
    assert torch.equal(labels.long(), expected)


@pytest.mark.parametrize("wrong, named", [(4, "class 4"), (-1, "class -1")])
def test_class_out_of_range_names_the_key(wrong, named):
    with pytest.raises(ConfigError, match=rf"{named} is outside \[0, 4\).*NUM_CLASSES"):
        labeler()(ANCHORS, ground_truth(BOXES[:1], [torch.tensor([1, wrong])]))


@pytest.mark.parametrize("thresh", [0.3, 0.5, 0.9, 1.0])
def test_anchors_in_crowds_are_those_of_coco(thresh):
    """The share is pycocotools' IoU of detections (the anchors) with crowds."""
    anchors = random_boxes(500, 1)
    # images with one crowd, none and four
    crowds = [random_boxes(1, 2) * 1.5, BOXES[1], random_boxes(4, 3)]
    crowds[2][0] = torch.tensor([10.0, 10, 90, 90])  # some anchors lie inside it
    batch = ground_truth(NO_BOXES * 3, NO_CLASSES * 3, crowds)
    targets = labeler(ignore_iof_thresh=thresh)(anchors, batch)
    for n, crowd in enumerate(crowds):
        ignored = targets.ignored_anchor[targets.ignored_image == n]
        if not len(crowd):
            assert not len(ignored)
            continue
        share = coco_mask.iou(xywh(anchors), xywh(crowd), [1] * len(crowd)).max(axis=1)
        # float32 corners and float64 sizes: neither gives exactly 1 for certain
        assert ignored.tolist() == np.where(share >= thresh - 1e-6)[0].tolist()
        assert 0 < len(ignored) < len(anchors)


def xywh(boxes):
    boxes = boxes.double().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def test_crowds_change_only_background():
    """Positive anchors stay positive, ignored anchors stay ignored."""
    everything = torch.tensor([[-10.0, -10, 100, 20]])
    batch = ground_truth(BOXES[:1], CLASSES[:1], [everything])
    targets = labeler(ignore_iof_thresh=0.5)(ANCHORS, batch)
    assert targets.label_NR.tolist() == [[IGNORED, 3, IGNORED, IGNORED]]


@pytest.mark.parametrize("thresh", [None, 0.5])
def test_crowds_are_no_objects(thresh):
    """They match no anchor, are no assigned box, and their class is not checked."""
    everything = torch.tensor([[0.0, 0, 70, 10]])
    # the crowd in the second image, and exactly over an anchor in the third
    crowds = [BOXES[1], everything, ANCHORS[:1]]
    with_crowds = labeler("always", ignore_iof_thresh=thresh)(
        ANCHORS, ground_truth(BOXES, CLASSES, crowds)
    )
    without = labeler("always")(ANCHORS, ground_truth(BOXES, CLASSES))
    assert torch.equal(with_crowds.gt_boxes_G4, without.gt_boxes_G4)
    assert torch.equal(with_crowds.gt_NR, without.gt_NR)
    # without a threshold an anchor in a crowd is background, as in Detectron2
    expected = without.label_NR
    if thresh is not None:
        expected = torch.tensor([expected[0].tolist(), [IGNORED] * 4, [IGNORED, -1, -1, 0]])
    assert with_crowds.label_NR.tolist() == expected.tolist()


def test_a_matcher_of_your_own_sees_only_objects():
    seen = []

    def match(gt_boxes_G4, anchors_R4):
        seen.append(gt_boxes_G4)
        R = len(anchors_R4)
        return torch.zeros(R, dtype=torch.int64), torch.full((R,), BACKGROUND)

    crowds = [ANCHORS, BOXES[1], ANCHORS[:1]]
    AnchorLabeler(match, 4)(ANCHORS, ground_truth(BOXES, CLASSES, crowds))
    assert [boxes.tolist() for boxes in seen] == [boxes.tolist() for boxes in BOXES]


def test_matcher_with_detectron2s_labels_raises():
    """Its 1 is a match and its 0 background; read as ours, every anchor would be positive."""

    def detectron2s(gt_boxes_G4, anchors_R4):
        return torch.zeros(len(anchors_R4), dtype=torch.int64), torch.tensor([1, 0, -1, 0])

    with pytest.raises(ConfigError, match="the matcher gives label 1: return 0 for a matched"):
        AnchorLabeler(detectron2s, 4)(ANCHORS, ground_truth(BOXES[:1], CLASSES[:1]))


def test_iscrowd_may_be_integers_as_in_coco():
    (instances,) = ground_truth(BOXES[:1], CLASSES[:1], [ANCHORS[:1]])
    instances.gt_iscrowd = instances.gt_iscrowd.long()
    targets = labeler(ignore_iof_thresh=0.5)(ANCHORS, [instances])
    assert targets.label_NR.tolist() == [[IGNORED, 3, IGNORED, BACKGROUND]]


def test_missing_field_gt_iscrowd_names_the_key():
    batch = ground_truth(BOXES[:1], CLASSES[:1], [ANCHORS[:1]]) + ground_truth(BOXES, CLASSES)
    with pytest.raises(ConfigError, match="IGNORE_IOF_THRESH needs the field gt_iscrowd"):
        labeler(ignore_iof_thresh=0.5)(ANCHORS, batch)


def test_share_at_the_threshold_is_enough():
    """5 of an anchor's 10 pixels are half of it; 4 are not, and two crowds do not add up."""
    crowds = torch.tensor([[-50.0, 0, 5, 10], [20, 0, 24, 10], [26, 0, 30, 10], [0, 50, 70, 60]])
    batch = ground_truth(NO_BOXES, NO_CLASSES, [crowds])
    targets = labeler(ignore_iof_thresh=0.5)(ANCHORS, batch)
    assert targets.ignored_anchor.tolist() == [0]


def test_anchors_without_area_lie_in_no_crowd():
    """Nor do anchors with swapped corners, in one direction or both."""
    anchors = torch.tensor(
        [[5.0, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [9, 9, 5, 5], [5, 5, 9, 9]]
    )
    batch = ground_truth(NO_BOXES, NO_CLASSES, [torch.tensor([[0.0, 0, 20, 20]])])
    targets = labeler(ignore_iof_thresh=0.1)(anchors, batch)
    assert targets.ignored_anchor.tolist() == [5]


@pytest.mark.parametrize("thresh", [0, -0.5, 1.01, float("nan")])
def test_threshold_out_of_range_names_its_key(thresh):
    with pytest.raises(ConfigError, match=r"IGNORE_IOF_THRESH must lie in \(0, 1\]"):
        labeler(ignore_iof_thresh=thresh)


@pytest.mark.parametrize("arbitrary", [-2, 7])
@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int8), (torch.int32, torch.int64)])
def test_index_of_an_anchor_that_is_not_matched_is_arbitrary(arbitrary, dtypes):
    """And in an image without boxes every anchor is background, whatever the matcher calls it."""

    def match(boxes, anchors):
        index = torch.tensor([arbitrary, 0, arbitrary, arbitrary], dtype=dtypes[0])
        return index, torch.tensor([BACKGROUND, 0, IGNORED, BACKGROUND], dtype=dtypes[1])

    targets = AnchorLabeler(match, 4)(ANCHORS, ground_truth(BOXES, CLASSES))
    assert targets.label_NR.tolist() == [[-1, 3, -2, -1], [-1, -1, -1, -1], [-1, 0, -2, -1]]
    assert torch.equal(targets.positive_gt_box, torch.stack([BOXES[0][0], BOXES[2][0]]))
    assert 0 <= targets.gt_NR.min() and targets.gt_NR.max() <= len(targets.gt_boxes_G4)
