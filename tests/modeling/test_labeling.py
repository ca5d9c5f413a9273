"""Dense targets of a batch."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from retina_plugin.errors import ConfigError
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


def random_boxes(n, seed, size=96):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(n, 2, generator=generator) * size * 0.4
    return torch.cat([corner, corner + side], dim=1)


def test_positives_and_ignored_by_image():
    targets = labeler()(ANCHORS, BOXES, CLASSES)
    assert targets.num_images == 3
    assert targets.positive_image.tolist() == [0, 2]
    assert targets.positive_anchor.tolist() == [1, 3]
    assert targets.positive_class.tolist() == [3, 0]
    assert torch.equal(targets.positive_gt_box, torch.cat([BOXES[0][:1], BOXES[2]]))
    assert targets.ignored_image.tolist() == [0] and targets.ignored_anchor.tolist() == [2]
    assert targets.num_positives_N().tolist() == [1, 0, 1]


def test_a_batch_is_its_images_in_order():
    """Each image's part is what the matcher says of it alone, anchors rising."""
    anchors = random_boxes(300, 0)
    boxes = [random_boxes(n, n) for n in (5, 0, 20, 1)]
    classes = [torch.arange(len(b)) % 4 for b in boxes]
    targets = labeler("always")(anchors, boxes, classes)
    for n in range(len(boxes)):
        gt, label = labeler("always").matcher(boxes[n], anchors)
        here, ignored = targets.positive_image == n, targets.ignored_image == n
        positive = torch.where(label == 1)[0]
        assert torch.equal(targets.positive_anchor[here], positive)
        assert torch.equal(targets.positive_class[here], classes[n][gt[positive]])
        assert torch.equal(targets.positive_gt_box[here], boxes[n][gt[positive]])
        assert torch.equal(targets.ignored_anchor[ignored], torch.where(label == -1)[0])
    assert (targets.positive_image.diff() >= 0).all() and (targets.ignored_image.diff() >= 0).all()


def test_only_empty_images():
    targets = labeler("always")(ANCHORS, NO_BOXES * 2, NO_CLASSES * 2)
    assert len(targets.positive_anchor) == len(targets.ignored_anchor) == 0
    assert targets.num_positives_N().tolist() == [0, 0]


@pytest.mark.parametrize("wrong, named", [(4, "class 4"), (-1, "class -1")])
def test_a_class_outside_the_range_names_the_key(wrong, named):
    with pytest.raises(ConfigError, match=rf"{named} is outside \[0, 4\).*NUM_CLASSES"):
        labeler()(ANCHORS, BOXES[:1], [torch.tensor([1, wrong])])


@pytest.mark.parametrize("thresh", [0.3, 0.5, 0.9, 1.0])
def test_crowds_ignore_what_coco_says_lies_in_them(thresh):
    """The share is pycocotools' IoU of detections (the anchors) with crowds."""
    anchors = random_boxes(500, 1)
    # crowds of one and of several boxes, and an image without
    crowds = [random_boxes(1, 2) * 1.5, BOXES[1], random_boxes(4, 3)]
    crowds[2][0] = torch.tensor([10.0, 10, 90, 90])  # holds some anchors entirely
    targets = labeler(ignore_iof_thresh=thresh)(anchors, NO_BOXES * 3, NO_CLASSES * 3, crowds)
    for n, crowd in enumerate(crowds):
        ignored = targets.ignored_anchor[targets.ignored_image == n]
        if not len(crowd):
            assert not len(ignored)
            continue
        share = coco_mask.iou(xywh(anchors), xywh(crowd), [1] * len(crowd)).max(axis=1)
        # float32 corners and float64 sizes: exactly 1 is not certain in either
        assert ignored.tolist() == np.where(share >= thresh - 1e-6)[0].tolist()
        assert 0 < len(ignored) < len(anchors)


def xywh(boxes):
    boxes = boxes.double().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def test_crowds_change_only_background():
    """Positives stay positive, ignored anchors stay ignored, and are not named twice."""
    everything = torch.tensor([[-10.0, -10, 100, 20]])
    targets = labeler(ignore_iof_thresh=0.5)(ANCHORS, BOXES[:1], CLASSES[:1], [everything])
    assert targets.positive_anchor.tolist() == [1]
    assert targets.ignored_anchor.tolist() == [0, 2, 3]


def test_the_share_at_the_threshold_is_enough():
    """5 of an anchor's 10 pixels are half of it; 4 are not, and those of two crowds don't add."""
    crowds = torch.tensor([[-50.0, 0, 5, 10], [20, 0, 24, 10], [26, 0, 30, 10], [0, 50, 70, 60]])
    targets = labeler(ignore_iof_thresh=0.5)(ANCHORS, NO_BOXES, NO_CLASSES, [crowds])
    assert targets.ignored_anchor.tolist() == [0]


def test_anchors_without_area_lie_in_no_crowd():
    """Nor do those turned inside out, in one direction or both."""
    anchors = torch.tensor(
        [[5.0, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [9, 9, 5, 5], [5, 5, 9, 9]]
    )
    crowd = [torch.tensor([[0.0, 0, 20, 20]])]
    targets = labeler(ignore_iof_thresh=0.1)(anchors, NO_BOXES, NO_CLASSES, crowd)
    assert targets.ignored_anchor.tolist() == [5]


@pytest.mark.parametrize("settings, crowds", [({}, True), ({"ignore_iof_thresh": 0.5}, False)])
def test_without_threshold_or_crowds_nothing_changes(settings, crowds):
    """As in Detectron2, where crowds are background."""
    crowd_boxes = [ANCHORS] * 3 if crowds else None
    targets = labeler(**settings)(ANCHORS, BOXES, CLASSES, crowd_boxes)
    assert targets.ignored_anchor.tolist() == [2]


@pytest.mark.parametrize("thresh", [0, -0.5, 1.01, float("nan")])
def test_an_impossible_share_names_its_key(thresh):
    with pytest.raises(ConfigError, match=r"IGNORE_IOF_THRESH must lie in \(0, 1\]"):
        labeler(ignore_iof_thresh=thresh)


@pytest.mark.parametrize("nothing", [-2, 7])
@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int8), (torch.int32, torch.int64)])
def test_a_matcher_may_name_any_box_for_what_is_not_positive(nothing, dtypes):
    def match(boxes, anchors):
        index = torch.tensor([nothing, 0, nothing, nothing], dtype=dtypes[0])
        label = torch.tensor([0, 1 if len(boxes) else 0, -1, 0], dtype=dtypes[1])
        return index, label

    targets = AnchorLabeler(match, 4)(ANCHORS, BOXES, CLASSES)
    assert targets.label_NR.tolist() == [[-1, 3, -2, -1], [-1, -1, -2, -1], [-1, 0, -2, -1]]
    assert torch.equal(targets.positive_gt_box, torch.stack([BOXES[0][0], BOXES[2][0]]))
    assert 0 <= targets.gt_NR.min() and targets.gt_NR.max() <= len(targets.gt_boxes_G4)
