"""Intervals of AP: their resamples equal pycocotools, and they cover the truth."""

import copy
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from reproduction import intervals


@pytest.fixture
def annotations(tmp_path):
    """A file of 12 images with objects of three classes, one of them rare, and a crowd."""
    rng = np.random.default_rng(0)
    images = [{"id": 10 + i, "width": 100, "height": 100} for i in range(12)]
    objects = []
    for image in images:
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = *rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)
            objects.append({"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            objects[-1] |= {"image_id": image["id"], "category_id": int(rng.integers(1, 3))}
    objects[0]["category_id"] = 3
    objects[1]["iscrowd"] = 1
    for number, one in enumerate(objects):
        one["id"] = number + 1
    data = {"images": images, "annotations": objects}
    data["categories"] = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def predictions(annotations):
    """Right, shifted, of another class, and in the background."""
    rng = np.random.default_rng(1)
    found = []
    for one in json.loads(annotations.read_text())["annotations"]:
        for _ in range(2):
            x, y, w, h = one["bbox"]
            box = [x + rng.normal(0, 2), y + rng.normal(0, 2), w, h]
            k = one["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 4))
            found.append({"image_id": one["image_id"], "category_id": k, "bbox": box})
    for image in range(10, 22):
        box = [*rng.uniform(0, 60, 2), 20.0, 20.0]
        found.append({"image_id": image, "category_id": int(rng.integers(1, 4)), "bbox": box})
    return [{**one, "score": float(rng.random())} for one in found]


def ap_of_copies(annotations, predictions, counts):
    """pycocotools' AP on a dataset with so many copies of each image."""
    data = json.loads(annotations.read_text())
    copies = {"images": [], "annotations": [], "categories": data["categories"]}
    found = []
    for image, count in zip(data["images"], counts):
        for _ in range(count):
            new = len(copies["images"]) + 1
            copies["images"].append({**image, "id": new})
            for source, target in (
                (data["annotations"], copies["annotations"]),
                (predictions, found),
            ):
                target += [{**x, "image_id": new} for x in source if x["image_id"] == image["id"]]
    for number, one in enumerate(copies["annotations"]):
        one["id"] = number + 1
    truth = COCO()
    truth.dataset = copies
    truth.createIndex()
    coco = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "bbox")
    coco.evaluate()
    coco.accumulate()
    coco.summarize()
    return 100 * coco.stats[0]


def test_resamples_equal_pycocotools_on_copies_of_the_images(annotations, predictions):
    rng = np.random.default_rng(2)
    weights = np.stack([np.ones(12, int), *rng.multinomial(12, np.full(12, 1 / 12), size=8)])
    found = intervals.weighted_ap(COCO(str(annotations)), predictions, weights)
    expected = [ap_of_copies(annotations, predictions, counts) for counts in weights]
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_all_models_are_scored_on_the_same_resamples(annotations, predictions):
    first = intervals.resampled_ap(annotations, predictions)
    assert first.shape == (intervals.RESAMPLES,)
    np.testing.assert_array_equal(first, intervals.resampled_ap(annotations, predictions))
    better = [{**one, "score": one["score"] / 2} for one in predictions]  # the same order
    np.testing.assert_allclose(first, intervals.resampled_ap(annotations, better), atol=1e-9)


def test_no_detections_have_no_ap(annotations):
    assert not intervals.resampled_ap(annotations, []).any()


def runs_of(rng, mean, images, num_seeds, seed_spread=2.0):
    """APs of new seeds on resamples: hard images are hard for every model."""
    seeds = rng.normal(0, seed_spread, num_seeds)
    return [mean + seed + images for seed in seeds]


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_spread_of_few_seeds_is_enlarged_to_that_of_new_ones(num_seeds):
    """The draws' variance is on average that of the mean of new seeds, 4 / n."""
    rng = np.random.default_rng(3)
    still = np.zeros(intervals.RESAMPLES)
    variances = []
    for _ in range(300):
        runs = np.array(runs_of(rng, 30, still, num_seeds))
        resample, seeds = intervals._chosen(num_seeds, 0)
        variances.append(intervals._draw(runs, resample[:1000], seeds[:1000]).var())
    assert np.mean(variances) == pytest.approx(4 / num_seeds, rel=0.25)


def test_interval_of_a_difference_has_no_part_of_what_both_share():
    """Images that are hard for both: their spread is in each row's interval only."""
    rng = np.random.default_rng(4)
    images = rng.normal(0, 3, intervals.RESAMPLES)
    rows = [runs_of(rng, mean, images, 3, seed_spread=0.1) for mean in (30, 32)]
    low, high = intervals.interval(rows[0], 30.0)
    assert high - low == pytest.approx(2 * 1.96 * 3, rel=0.15)
    low, high = intervals.difference_interval(rows[1], rows[0], 2.0)
    assert 1.5 < low < 2.0 < high < 2.5


@pytest.mark.parametrize(("num_seeds", "expected"), [(2, 0.91), (3, 0.94)])
def test_interval_covers_the_true_difference(num_seeds, expected):
    """APs vary by 1.5 over seeds, by 1 over images for both rows and by .7 for each."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        images = rng.normal() + rng.normal(size=intervals.RESAMPLES)
        rows = []
        for mean in (30, 34):
            own = rng.normal(0, 0.7) + rng.normal(0, 0.7, intervals.RESAMPLES)
            rows.append(runs_of(rng, mean, images + own, num_seeds, seed_spread=1.5))
        difference = np.mean(rows[1]) - np.mean(rows[0])
        low, high = intervals.difference_interval(rows[1], rows[0], difference)
        covered += low <= 4 <= high
    assert covered / 600 == pytest.approx(expected, abs=0.03)
