"""Detections of an exported file beside those of the predictor."""

import numpy as np

__all__ = ["assert_same_detections"]

SCORE, BOX = 5e-6, 3e-4  # the largest differences, boxes in pixels


def assert_same_detections(boxes, scores, classes, expected):
    """The same detections in the same order, but for the order of scores that are so close."""
    assert len(scores) == len(expected) > 0
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=SCORE)
    for box, score, k in zip(boxes, scores, classes):
        close = np.abs(expected.scores - score) <= SCORE
        close &= expected.class_ids == k
        assert (np.abs(expected.boxes[close] - box) <= BOX).all(axis=1).any(), (box, score, k)
