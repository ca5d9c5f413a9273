"""hotcoco's numbers in a report, against short computations that share no code with it."""

import copy

import numpy as np
import pytest
from pycocotools import mask

from retina_plugin.analysis import GroundTruth, analyze
from retina_plugin.analysis.matching import Evaluation
from retina_plugin.analysis.predictions import read_predictions
from tests.analysis.toy import dataset, detections


def greedy(found, objects):
    """Pairs of a detection, the most confident first, and the free object that it is nearest to."""
    free = list(objects)
    for detection in sorted(found, key=lambda d: -d["score"]):
        iou = mask.iou([detection["bbox"]], [o["bbox"] for o in free], [0] * len(free))
        taken = int(iou[0].argmax()) if len(free) and iou.max() >= 0.5 else None
        yield detection, None if taken is None else free.pop(taken)
    yield from ((None, o) for o in free)


def of_image(entries, image):
    return [entry for entry in entries if entry["image_id"] == image["id"]]


@pytest.fixture(scope="module")
def without_crowd():
    coco = dataset(images=40)
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = 0
    results = detections(coco, seed=3)
    return coco, results, analyze(GroundTruth.from_coco(copy.deepcopy(coco), "toy"), results)


def test_confusion_is_that_of_a_short_computation(without_crowd):
    coco, results, analysis = without_crowd
    place = {c["id"]: k for k, c in enumerate(coco["categories"])}
    background = len(place)
    expected = np.zeros((background + 1, background + 1), int)
    shown = [d for d in results if d["score"] >= analysis.thresholds[place[d["category_id"]]]]
    for image in coco["images"]:
        for pair in greedy(of_image(shown, image), of_image(coco["annotations"], image)):
            column, row = (background if x is None else place[x["category_id"]] for x in pair)
            expected[row, column] += 1
    assert expected.trace() > 20 and (analysis.confusion == expected).all()
    assert (expected - np.diag(np.diag(expected)) > 0).sum() > 6


def test_calibration_is_that_of_a_short_computation(without_crowd):
    coco, results, analysis = without_crowd
    pairs = [
        (d["score"], o is not None)
        for image in coco["images"]
        for c in coco["categories"]
        for d, o in greedy(
            *(
                [x for x in of_image(entries, image) if x["category_id"] == c["id"]]
                for entries in (results, coco["annotations"])
            )
        )
        if d is not None
    ]
    scores, right = np.array(pairs).T
    bins = [(scores >= k / 10) & (scores < (k + 1) / 10) for k in range(10)]
    gaps = [abs(scores[b].mean() - right[b].mean()) * b.mean() for b in bins if b.any()]
    assert sum(gaps) > 0.05
    assert analysis.calibration["ece"] == pytest.approx(sum(gaps), abs=1e-12)


def test_interval_is_as_wide_as_that_of_a_bootstrap():
    """Against the textbook's: images drawn with repetition, and each copy counted."""
    coco = dataset(images=120)
    results = [detections(coco, seed) for seed in (1, 2)]
    truth = GroundTruth.from_coco(copy.deepcopy(coco), "toy")
    ap = analyze(truth, *results, resamples=400).comparison.metrics["AP"]
    rng, differences = np.random.default_rng(0), []
    for _ in range(100):
        drawn = rng.integers(1, 121, 120).tolist()
        repeated = {**coco, "images": [{"id": i} for i in range(120)]}
        of_copy = [
            [
                {**entry, "image_id": i}
                for i, image in enumerate(drawn)
                for entry in entries
                if entry["image_id"] == image
            ]
            for entries in (coco["annotations"], *results)
        ]
        repeated["annotations"] = of_copy[0]
        again = GroundTruth.from_coco(repeated, "toy")
        values = [
            Evaluation(again, read_predictions(found, again)).summary()["AP"]
            for found in of_copy[1:]
        ]
        differences.append(values[0] - values[1])
    width = (ap["upper"] - ap["lower"]) / (2 * 1.96 * np.std(differences))
    assert 0.85 < width < 1.2  # hotcoco's own: .7
