"""Dense targets of a batch."""

import pytest
import torch

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
BOXES = [
    torch.tensor([[20.0, 0, 30, 10], [40, 0, 50, 4.5]]),  # positive; between the thresholds
    torch.zeros(0, 4),
    torch.tensor([[60.0, 0, 70, 9]]),
]
CLASSES = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([0])]


def labeler(low_quality="never", num_classes=4):
    return AnchorLabeler(AnchorMatcher([0.4, 0.5], [0, -1, 1], low_quality), num_classes)


def test_positives_and_ignored_by_image():
    targets = labeler()(ANCHORS, BOXES, CLASSES)
    assert targets.num_images == 3
    assert targets.positive_image.tolist() == [0, 2]
    assert targets.positive_anchor.tolist() == [1, 3]
    assert targets.positive_class.tolist() == [3, 0]
    assert torch.equal(targets.positive_gt_box, torch.cat([BOXES[0][:1], BOXES[2]]))
    assert targets.ignored_image.tolist() == [0] and targets.ignored_anchor.tolist() == [2]
    assert targets.num_positives_N().tolist() == [1, 0, 1]


def test_only_empty_images():
    targets = labeler("always")(ANCHORS, BOXES[1:2] * 2, CLASSES[1:2] * 2)
    assert len(targets.positive_anchor) == len(targets.ignored_anchor) == 0
    assert targets.num_positives_N().tolist() == [0, 0]


@pytest.mark.parametrize("wrong, named", [(4, "class 4"), (-1, "class -1")])
def test_a_class_outside_the_range_names_the_key(wrong, named):
    with pytest.raises(ConfigError, match=rf"{named} is outside \[0, 4\).*NUM_CLASSES"):
        labeler()(ANCHORS, BOXES[:1], [torch.tensor([1, wrong])])
