"""The numbers of a report, against pycocotools and short computations of their own."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.analysis import GroundTruth, analyze
from retina_plugin.analysis.thresholds import Threshold, best_threshold
from retina_plugin.errors import ConfigError
from tests.analysis.toy import NAMES, dataset, detections


@pytest.fixture(scope="module")
def coco():
    return dataset()


@pytest.fixture(scope="module")
def truth(coco):
    return GroundTruth.from_coco(coco, "test")


@pytest.fixture(scope="module")
def results(coco):
    return detections(coco)


@pytest.fixture(scope="module")
def analysis(truth, results):
    return analyze(truth, results)


def pycocotools(coco, results):
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = coco
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_ap_is_that_of_pycocotools(analysis, coco, results):
    """Overall, by class, by size and by IoU."""
    expected = pycocotools(coco, results)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
    for name, value in zip(names, expected.stats):
        assert analysis.metrics[name] == pytest.approx(100 * value, abs=1e-9), name
    precision = expected.eval["precision"]  # IoU, recall, class, area, limit
    for k, c in enumerate(analysis.classes):
        for place, name in enumerate(("AP", "APs", "APm", "APl")):
            values = precision[:, :, k, place, 2]
            mean = 100 * values[values > -1].mean() if (values > -1).any() else None
            assert c.metrics[name] == (None if mean is None else pytest.approx(mean, abs=1e-9))
    by_iou = 100 * precision[:, :, :, 0, 2].mean(axis=(1, 2))
    assert analysis.curves.ap_by_iou == pytest.approx(by_iou, abs=1e-9)


def test_every_object_and_detection_is_counted_once(analysis, coco):
    """Right, wrong and missed, and the confusion matrix with its background."""
    objects = sum(not a["iscrowd"] for a in coco["annotations"])
    assert analysis.right + analysis.missed == objects
    assert analysis.right + analysis.wrong == len(analysis.shown.found)
    assert sum(image.right for image in analysis.images) == analysis.right
    matrix = analysis.confusion.astype(int)
    assert matrix[:-1].sum() == objects and matrix[-1, -1] == 0


def test_best_threshold_has_the_best_f1(analysis):
    """Tried at every score."""
    for c in analysis.classes:
        assert c.best.f1 == pytest.approx(
            2 * c.best.precision * c.best.recall / (c.best.precision + c.best.recall)
        )
    best = analysis.overall
    assert best.f1 >= analysis.curves.sweep[2].max() - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_that_of_trying_all(seed):
    """Also where the detection with the highest score is wrong."""
    rng = np.random.default_rng(seed)
    scores = rng.choice(np.linspace(0.1, 0.9, 9), size=12)
    right = rng.random(12) < 0.4
    right[scores.argmax()] = False
    objects = int(right.sum()) + 3
    kept = [scores >= cut for cut in scores]
    f1 = [2 * (right & of).sum() / (of.sum() + objects) for of in kept]
    best = best_threshold(scores, right, objects)
    assert best.f1 == pytest.approx(max(f1))
    at = scores >= best.score
    assert best.precision == pytest.approx(right[at].mean())
    assert best.recall == pytest.approx(right[at].sum() / objects)


def test_no_right_detection_has_no_threshold():
    scores = np.array([0.9, 0.5])
    assert best_threshold(scores, np.zeros(2, bool), 4) == Threshold(None, None, 0.0, 0.0)
    assert best_threshold(scores[:0], np.zeros(0, bool), 0) == Threshold(None, None, None, None)


def test_perfect_detections_leave_nothing_to_say(truth, coco):
    perfect = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for a in coco["annotations"]
        if not a["iscrowd"]
    ]
    analysis = analyze(truth, perfect)
    assert analysis.metrics["AP"] == pytest.approx(100)
    assert (analysis.wrong, analysis.missed) == (0, 0)
    assert not any(analysis.cases.values())
    assert all(error.cost == pytest.approx(0) for error in analysis.errors)


def test_error_types_are_told_apart(coco, truth):
    """One wrong class in each image costs AP as a wrong class, not as background."""
    ids = [c["id"] for c in coco["categories"]]
    swapped = [
        {
            "image_id": a["image_id"],
            "category_id": ids[(ids.index(a["category_id"]) + 1) % 3]
            if a["category_id"] == 5
            else a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in coco["annotations"]
        if not a["iscrowd"]
    ]
    analysis = analyze(truth, swapped)
    assert analysis.errors[0].name == "Cls" and analysis.errors[0].cost > 20
    assert {c.kind for cases in analysis.cases.values() for c in cases} <= {"swap", "suspect"}


@pytest.mark.parametrize(
    ("crowd", "counts"),
    [
        (None, True),
        ([200.0, 200.0, 100.0, 40.0], True),  # holds 40 % of the wrong detection
        ([150.0, 150.0, 200.0, 200.0], False),  # holds all of it
        ([10.0, 10.0, 50.0, 50.0], True),  # lies on the object
    ],
)
def test_crowds_are_no_objects_for_the_error_types(crowd, counts):
    """A detection in a crowd costs nothing. Beside one it is background, not a wrong box."""
    boxes = [[10.0, 10.0, 50.0, 50.0], [200.0, 200.0, 100.0, 100.0]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": i}
            for i, box in enumerate([boxes[0], *([crowd] if crowd else [])])
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for box, score in zip(boxes, (0.05, 0.9))
    ]
    analysis = analyze(GroundTruth.from_coco(content, "test"), found, resamples=0)
    errors = {error.name: (error.count, error.cost) for error in analysis.errors if error.count}
    assert errors == ({"Bkg": (1, pytest.approx(50))} if counts else {})
    assert analysis.false_positives == pytest.approx(50 if counts else 0)
    assert analysis.base == pytest.approx(analysis.metrics["AP50"])


def test_base_of_the_error_types_is_ap50(analysis):
    assert analysis.truth.crowds.any()
    assert analysis.base == pytest.approx(analysis.metrics["AP50"], abs=1e-9)


def test_better_model_is_better_by_its_interval(coco, truth, results):
    better = detections(coco, quality=0.01)
    comparison = analyze(truth, better, results).comparison
    ap = comparison.metrics["AP"]
    assert ap["lower"] <= ap["difference"] <= ap["upper"] and ap["difference"] > 5
    same = analyze(truth, results, results).comparison
    assert same.metrics["AP"]["difference"] == 0 and not same.changed


def test_json_has_no_nan(analysis):
    content = json.loads(analysis.to_json())
    assert content["metrics"]["AP"] == analysis.metrics["AP"]

    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        return [y for x in value for y in numbers(x)] if isinstance(value, list) else [value]

    assert all(math.isfinite(x) for x in numbers(content) if isinstance(x, float))


@pytest.mark.parametrize(
    "case", ["no detections", "no objects", "one class", "text ids", "no area, no iscrowd"]
)
def test_odd_sets(case):
    coco = dataset(images=4, classes=NAMES[:1] if case == "one class" else NAMES)
    results = [] if case == "no detections" else detections(coco)
    if case == "no objects":
        coco["annotations"] = []
    if case == "text ids":
        for entry in (*coco["annotations"], *results):
            entry["image_id"] = f"image {entry['image_id']}"
        for image in coco["images"]:
            image["id"] = f"image {image['id']}"
    if case.startswith("no area"):
        for entry in coco["annotations"]:
            del entry["area"], entry["iscrowd"]
    analysis = analyze(GroundTruth.from_coco(coco, "test"), results)
    json.loads(analysis.to_json())
    assert (analysis.metrics["AP"] is None) == (case == "no objects")


def crowded(classes, objects=150):
    """One image with more objects than COCO counts, all of them found."""
    coco = {
        "images": [{"id": 1, "file_name": "1.png", "width": 2000, "height": 2000}],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
    }
    boxes = [[i % 15 * 100.0, i // 15 * 100.0, 60.0, 60.0] for i in range(objects)]
    entries = [
        {"image_id": 1, "category_id": i % classes + 1, "bbox": b} for i, b in enumerate(boxes)
    ]
    coco["annotations"] = [{**e, "id": i + 1} for i, e in enumerate(entries)]
    return coco, [{**e, "score": 0.9 - 0.001 * i} for i, e in enumerate(entries)]


def test_more_than_100_objects_in_an_image_are_all_counted():
    """AP counts the 100 best of a class, as COCO does; the rest counts what a user sees."""
    coco, results = crowded(classes=5)
    analysis = analyze(GroundTruth.from_coco(coco, "test"), results)
    assert analysis.metrics["AP"] == pytest.approx(100)
    assert (np.diag(analysis.confusion) == [30] * 5 + [0]).all() and analysis.confusion.sum() == 150
    coco, results = crowded(classes=1)
    analysis = analyze(GroundTruth.from_coco(coco, "test"), results)
    assert analysis.metrics["AR100"] == pytest.approx(100 * 100 / 150)
    assert (analysis.right, analysis.wrong, analysis.missed) == (150, 0, 0)
    assert analysis.classes[0].best.f1 == 1 and not analysis.cases["miss"]
    _, recall, _ = analysis.curves.sweep
    assert recall.max() == 1


def test_annotations_of_unknown_images_are_left_out(results, caplog):
    """Detectron2, pycocotools and the doctor's warning say the same."""
    coco = dataset()
    expected = analyze(GroundTruth.from_coco(copy.deepcopy(coco), "test"), results).metrics
    coco["annotations"] += [{**coco["annotations"][0], "id": 999, "image_id": 77}, None]
    with caplog.at_level("WARNING"):
        truth = GroundTruth.from_coco(coco, "test")
    assert "1 annotations are of images that the file does not have" in caplog.text
    assert analyze(truth, results).metrics == expected


def test_area_null_is_that_of_the_box_and_text_is_one_line(results):
    coco = dataset()
    for annotation in coco["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    expected = analyze(GroundTruth.from_coco(copy.deepcopy(coco), "test"), results).metrics
    for annotation in coco["annotations"]:
        annotation["area"] = None
    assert analyze(GroundTruth.from_coco(copy.deepcopy(coco), "test"), results).metrics == expected
    coco["annotations"][1]["area"] = "big"
    with pytest.raises(ConfigError, match="annotation 2 of test has the area 'big'"):
        GroundTruth.from_coco(coco, "test")


def test_detections_that_were_cut_are_named(truth, results, caplog):
    """AP of what `retina predict` shows is lower than the model's."""
    low = [{**results[0], "score": 0.05}, *results]
    analyze(truth, low)
    assert "no score is below" not in caplog.text
    analyze(truth, [r for r in results if r["score"] >= 0.3])
    assert "the predictions: no score is below 0.3" in caplog.text


def test_files_that_are_known_by_their_name_alone_are_named(truth, results, caplog):
    cut = [r for r in results if r["image_id"] < 3]
    analyze(truth, [{**r, "file_name": f"/elsewhere/{r['image_id']}.png"} for r in cut])
    assert "2 files are taken for images of test by their name alone, such as" in caplog.text
    assert "/elsewhere/1.png for 1.png" in caplog.text


def test_other_files_are_not_taken_for_images_by_their_ids(coco, truth, results):
    """The ids of `retina predict` are running numbers: AP was 5.6 in place of 100."""
    named = [{**r, "file_name": f"{r['image_id']}.jpg"} for r in results]
    with pytest.raises(ConfigError, match=r"such as '\d+\.jpg'.* another dataset"):
        analyze(truth, named)
    for image in (nameless := copy.deepcopy(coco))["images"]:
        del image["file_name"]
    expected = analyze(truth, results).metrics  # by the ids
    assert analyze(GroundTruth.from_coco(nameless, "test"), named).metrics == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"detection 1 has the score nan"),
        ({"score": 2}, r"detection 1 has the score 2"),
        ({"bbox": [1, 2, 3]}, r"box \[1, 2, 3\]"),
        ({"bbox": [1, 2, float("inf"), 3]}, "inf"),
        ({"category_id": 99}, r"class 99, which test does not have"),
        ({"image_id": 99}, r"99.* another dataset"),
        ({"image_id": None}, "None"),
    ],
)
def test_bad_detections_are_one_line(truth, change, message):
    good = {"image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5}
    with pytest.raises(ConfigError, match=message) as error:
        analyze(truth, [{**good, **change}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{", "JSON"), ('{"images": []}', "not a list"), ("[1]", "entry 1")],
)
def test_bad_files_are_one_line(truth, tmp_path, content, message):
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        analyze(truth, tmp_path / "found.json")
    assert str(tmp_path / "found.json") in str(error.value)
    with pytest.raises(ConfigError, match=r"missing\.json"):
        analyze(truth, tmp_path / "missing.json")
