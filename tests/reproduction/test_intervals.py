"""Intervals of AP: their resamples equal pycocotools, and they cover the truth."""

import copy
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from reproduction import intervals
from reproduction.intervals import SeedSpread


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


def test_spread_of_the_seeds_is_pooled():
    spread = SeedSpread.pooled([[30.0, 32.0], [20.0, 21.0, 22.0], [5.0], []])
    assert spread.freedom == 3 and spread.variance == pytest.approx((2 + 2) / 3)
    assert SeedSpread.pooled([[30.0], []]) == SeedSpread(0.0, 0)


def test_width_is_that_of_welchs_test():
    """Known variances, no images' part: t of the pooled degrees of freedom."""
    still = [np.full(intervals.RESAMPLES, ap) for ap in (29.0, 31.0)]
    low, high = intervals.interval(still, 30.0, SeedSpread(8.0, 4))
    assert (30 - low, high - 30) == (pytest.approx(2.776 * 2, rel=1e-3),) * 2
    low, high = intervals.difference_interval(still, still[:1], 1.0, SeedSpread(8.0, 4))
    assert high - low == pytest.approx(2 * 2.776 * (8 / 2 + 8) ** 0.5, rel=1e-3)
    # a row that varies more than the others, here with variance 2, has its own
    low, high = intervals.interval(still, 30.0, SeedSpread(0.5, 4))
    assert high - low == pytest.approx(2 * 2.776 * 1.0, rel=1e-3)


def test_without_several_seeds_only_the_images_vary():
    images = np.random.default_rng(5).normal(30, 2, intervals.RESAMPLES)
    low, high = intervals.interval([images], 30.0, SeedSpread())
    assert high - low == pytest.approx(2 * 1.96 * images.std(ddof=1), rel=1e-3)


def test_interval_of_a_difference_has_no_part_of_what_both_share():
    """Images that are hard for both: their spread is in each row's interval only."""
    rng = np.random.default_rng(4)
    images = rng.normal(0, 3, intervals.RESAMPLES)
    rows = [runs_of(rng, mean, images, 3, seed_spread=0.1) for mean in (30, 32)]
    low, high = intervals.interval(rows[0], 30.0, SeedSpread(0.01, 60))
    assert high - low == pytest.approx(2 * 1.96 * 3, rel=0.15)
    low, high = intervals.difference_interval(rows[1], rows[0], 2.0, SeedSpread(0.01, 60))
    assert 1.5 < low < 2.0 < high < 2.5


@pytest.mark.parametrize("num_seeds", [2, 3])
@pytest.mark.parametrize(("seeds", "own_images"), [(1.5, 0.7), (1.5, 0.1), (0.3, 0.7)])
def test_interval_covers_the_true_difference(num_seeds, seeds, own_images):
    """Of two rows of 16. APs vary over seeds, by 1 over images for all rows and more for each."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        images = rng.normal() + rng.normal(size=intervals.RESAMPLES)
        rows = []
        for mean in (30, 34):
            own = rng.normal(0, own_images) + rng.normal(0, own_images, intervals.RESAMPLES)
            rows.append(runs_of(rng, mean, images + own, num_seeds, seed_spread=seeds))
        others = [rng.normal(20, seeds, num_seeds) for _ in range(14)]
        spread = SeedSpread.pooled([*np.mean(rows, axis=2), *others])
        difference = np.mean(rows[1]) - np.mean(rows[0])
        low, high = intervals.difference_interval(rows[1], rows[0], difference, spread)
        covered += low <= 4 <= high
    assert 0.93 <= covered / 600 <= 0.99
