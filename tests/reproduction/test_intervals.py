"""Intervals of AP: their resamples equal pycocotools, and they cover the truth."""

import copy
import json

import numpy as np
import pytest
import scipy.stats
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


def test_rows_that_vary_alike_share_their_variance():
    spread = SeedSpread.of_rows([[30.0, 32.0], [20.0, 21.0, 22.0], [5.0], [], [0.0, 0.0]])
    assert spread.freedom == 3 and spread.variance == pytest.approx((2 + 2) / 3)
    assert SeedSpread.of_rows([[30.0], []]) == SeedSpread(0.0, 0)


@pytest.mark.parametrize(("freedom", "variance"), [(4.0, 3.0), (2.0, 0.5)])
def test_what_rows_share_is_found(freedom, variance):
    """Variances drawn from a scaled inverse chi-square distribution, as Smyth assumes."""
    rng = np.random.default_rng(0)
    variance_R = variance * freedom / rng.chisquare(freedom, 4000)
    spread = SeedSpread.of_rows(rng.normal(20, sd, 3) for sd in variance_R**0.5)
    assert spread.freedom == pytest.approx(freedom, rel=0.25)
    assert spread.variance == pytest.approx(variance, rel=0.1)


def test_a_rows_variance_is_drawn_towards_that_of_all():
    """With the degrees of freedom as weights; one that is far larger stays."""
    spread = SeedSpread(4.0, 6.0)
    assert spread.of_row([20.0]) == (4.0, 6.0)
    variance, freedom = spread.of_row([20.0, 21.0, 22.0])
    assert (variance, freedom) == (pytest.approx((6 * 4 + 2 * 1) / 8), 8)
    assert spread.of_row([10.0, 30.0]) == (pytest.approx(200.0), 1)
    assert SeedSpread().of_row([20.0]) == (0.0, np.inf)
    assert SeedSpread().of_row([20.0, 22.0]) == (pytest.approx(2.0), 1)


def test_width_is_that_of_welchs_test():
    """No images' part: t of the degrees of freedom."""
    still = [np.full(intervals.RESAMPLES, ap) for ap in (29.0, 31.0)]  # variance 2
    low, high = intervals.interval(still, 30.0, SeedSpread(2.0, 3))
    assert (30 - low, high - 30) == (pytest.approx(2.776 * 1, rel=1e-3),) * 2  # t of 4
    # one row with variance 2 and 4 degrees of freedom, one with variance 2 and 3
    low, high = intervals.difference_interval(still, still[:1], 1.0, SeedSpread(2.0, 3))
    freedom = (2 / 2 + 2) ** 2 / ((2 / 2) ** 2 / 4 + 2**2 / 3)
    half = scipy.stats.t.ppf(0.975, freedom) * (2 / 2 + 2) ** 0.5
    assert high - low == pytest.approx(2 * half, rel=1e-6)


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


WILD = [1.0] * 24 + [10.0] * 4  # spreads of the other rows


@pytest.mark.parametrize(
    ("spreads", "others", "own_images", "num_seeds", "covers"),
    [
        ((1.5, 1.5), [1.5] * 14, 0.7, 2, 0.93),
        ((1.5, 1.5), [1.5] * 14, 0.1, 3, 0.93),
        ((0.3, 0.3), [0.3] * 14, 0.7, 2, 0.93),
        ((1.0, 1.0), WILD, 0.1, 2, 0.93),
        ((1.0, 1.0), WILD, 0.7, 3, 0.93),
        ((1.0, 10.0), WILD, 0.1, 3, 0.92),
        ((1.0, 10.0), WILD, 0.1, 2, 0.83),
    ],
)
def test_interval_covers_the_true_difference(spreads, others, own_images, num_seeds, covers):
    """APs vary over seeds, by 1 over images for all rows and more for each of the two."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        images = rng.normal() + rng.normal(size=intervals.RESAMPLES)
        rows = []
        for mean, seed_spread in zip((30, 34), spreads):
            own = rng.normal(0, own_images) + rng.normal(0, own_images, intervals.RESAMPLES)
            rows.append(runs_of(rng, mean, images + own, num_seeds, seed_spread))
        more = [rng.normal(20, sd, num_seeds) for sd in others]
        spread = SeedSpread.of_rows([*np.mean(rows, axis=2), *more])
        difference = np.mean(rows[1]) - np.mean(rows[0])
        low, high = intervals.difference_interval(rows[1], rows[0], difference, spread)
        covered += low <= 4 <= high
    assert covers <= covered / 600 <= 0.99
