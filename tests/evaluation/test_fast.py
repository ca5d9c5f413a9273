"""FastCOCOEvaluator equals Detectron2's COCOEvaluator to the last bit, in edge cases too."""

import copy
import json
import logging
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import COCOEvaluator, FastCOCOEvaluator, coco
from retina_plugin.evaluation.detections import optional_import, orjson

NAME = "test_fast_evaluator"
HOTCOCO = coco.hotcoco
needs_hotcoco = pytest.mark.skipif(HOTCOCO is None, reason="the extra 'fast' is not installed")


def scenes(seed, images=8, classes=4, ties=True, most=20):
    """A COCO dict and detections (image id, Instances), with every edge case of matching.

    Areas exactly on COCO's limits (sides of 32 and 96), equal boxes, equal scores, crowds, classes
    without boxes, images without boxes or detections, ids that are neither sorted nor contiguous.
    """
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(images) * 7 + 3).tolist()
    category_ids = [c * 3 + 1 for c in range(classes)]

    def boxes(n):
        if ties:
            return np.hstack(
                [rng.choice([0, 10, 40], (n, 2)), rng.choice([31, 32, 33, 96], (n, 2))]
            )
        return np.hstack([rng.random((n, 2)) * 100, np.exp(rng.normal(3.7, 0.8, (n, 2)))])

    annotations, detections = [], []
    for image in image_ids:
        truth = boxes(int(rng.integers(0, 8)) if rng.random() < 0.8 else 0).astype(np.float64)
        for box in truth:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category_ids[int(rng.integers(0, classes - 1))],
                    "bbox": box.tolist(),
                    # the box's area, or another one as of a mask: on a limit, just over it, 0
                    "area": float(rng.choice([box[2] * box[3], 32**2, 96**2, 96**2 + 1e-9, 0])),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
        n = int(rng.integers(0, most))
        found = boxes(n).astype(np.float64)
        if n and len(truth):
            copied = rng.random(n) < 0.6
            found[copied] = truth[rng.integers(0, len(truth), copied.sum())]
            if not ties:
                found[copied] += rng.normal(0, 3, (copied.sum(), 4))
        scores = rng.choice([0.0, 0.1, 0.5, 1.0], n) if ties else rng.random(n)
        xywh = torch.from_numpy(found).float()
        instances = Instances(
            (200, 200),
            pred_boxes=Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)),
            scores=torch.from_numpy(scores).float(),
            pred_classes=torch.from_numpy(rng.integers(0, classes, n)),
        )
        detections.append((image, instances))
    contents = {
        "images": [{"id": i, "file_name": "", "height": 200, "width": 200} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
    }
    return contents, detections


@pytest.fixture
def dataset(tmp_path):
    """dataset(contents) registers a COCO dict as NAME."""

    def write(contents):
        path = tmp_path / "set.json"
        path.write_text(json.dumps(contents))
        ids = [c["id"] for c in contents["categories"]]
        MetadataCatalog.get(NAME).set(
            json_file=str(path),
            thing_classes=[f"class {i}" for i in ids],
            thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(ids)},
        )
        return path

    yield write
    MetadataCatalog.pop(NAME, None)


def evaluator_of(cls, detections, output_dir=None, **options):
    """The evaluator after it processed the detections; COCOEvaluator is pycocotools'."""
    if issubclass(cls, COCOEvaluator):
        options |= {"tasks": ("bbox",), "use_fast_impl": False}
    evaluator = cls(NAME, output_dir=output_dir and str(output_dir), **options)
    evaluator.reset()
    for image_id, instances in detections:
        evaluator.process([{"image_id": image_id}], [{"instances": copy.deepcopy(instances)}])
    return evaluator


def assert_equal(results, expected):
    """To the bit, in the same order; NaN equals NaN."""
    assert list(results) == list(expected)
    assert list(results["bbox"]) == list(expected["bbox"])
    np.testing.assert_array_equal(
        list(results["bbox"].values()), list(expected["bbox"].values()), strict=True
    )


@needs_hotcoco
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_dets_per_image": 5}, {"max_dets_per_image": 300}])
def test_metrics_equal_detectron2s(dataset, caplog, ties, options):
    """Every metric of every class on random scenes, computed by hotcoco."""
    caplog.set_level(logging.DEBUG, "retina_plugin")
    for seed in range(8):
        contents, detections = scenes(seed, ties=ties)
        dataset(contents)
        expected = evaluator_of(COCOEvaluator, detections, **options)
        fast = evaluator_of(FastCOCOEvaluator, detections, **options)
        caplog.clear()
        assert_equal(fast.evaluate(), expected.evaluate())
        assert "Evaluating with hotcoco" in caplog.text
        first, second = (image["id"] for image in contents["images"][:2])
        # a new evaluator: Detectron2's can evaluate its predictions only once
        expected = evaluator_of(COCOEvaluator, detections, **options)
        subset = [second, first, second]
        assert_equal(fast.evaluate(img_ids=subset), expected.evaluate(img_ids=subset))


class KeepsSummary:
    """Mixed into an evaluator: keeps the COCOeval object that its metrics are derived from."""

    def _derive_coco_results(self, coco_eval, *args, **kwargs):
        self.summary = coco_eval
        return super()._derive_coco_results(coco_eval, *args, **kwargs)


class FastWithSummary(KeepsSummary, FastCOCOEvaluator):
    pass


class SlowWithSummary(KeepsSummary, COCOEvaluator):
    pass


@needs_hotcoco
@pytest.mark.parametrize("most", [20, 260])
def test_statistics_and_arrays_equal_pycocotools(dataset, most):
    """All 12 statistics, recall too, and the arrays of precision, recall and scores."""
    for seed in range(6):
        contents, detections = scenes(seed, ties=seed % 2 == 0, most=most)
        dataset(contents)
        evaluators = [evaluator_of(cls, detections) for cls in (FastWithSummary, SlowWithSummary)]
        for evaluator in evaluators:
            evaluator.evaluate()
        fast, slow = (evaluator.summary for evaluator in evaluators)
        assert np.array_equal(fast.stats, slow.stats) and len(slow.stats) == 12
        for array in ("precision", "recall", "scores"):
            assert np.array_equal(fast.eval[array], slow.eval[array])
        assert 0 < slow.stats[0] < 1  # not trivial


@pytest.mark.parametrize("with_orjson", [True, False])
def test_written_file_equals_detectron2s(dataset, tmp_path, monkeypatch, with_orjson):
    """The same list of results, number by number; NaN is written as NaN."""
    if not with_orjson:
        monkeypatch.setattr("retina_plugin.evaluation.detections.orjson", None)
    elif orjson is None:
        pytest.skip("the extra 'fast' is not installed")
    contents, detections = scenes(1, ties=False)
    del contents["annotations"]  # as in test-dev
    dataset(contents)
    detections[0][1].pred_boxes.tensor[0, 0] = torch.nan
    detections[2][1].scores = detections[2][1].scores.bfloat16()
    detections[3][1].scores = detections[3][1].scores.double() / 3
    assert min(len(detections[i][1]) for i in (0, 2, 3)) > 0
    for cls, folder in ((FastCOCOEvaluator, "fast"), (COCOEvaluator, "slow")):
        assert evaluator_of(cls, detections, tmp_path / folder).evaluate() == {}
    fast, slow = (
        (tmp_path / folder / "coco_instances_results.json").read_text()
        for folder in ("fast", "slow")
    )
    assert fast.count("NaN") == slow.count("NaN") == 2  # x and width
    assert len(json.loads(slow)) == sum(len(instances) for _, instances in detections)
    assert json.loads(fast.replace("NaN", "null")) == json.loads(slow.replace("NaN", "null"))


def hotcoco_not_installed(monkeypatch, contents, detections):
    monkeypatch.setattr(coco, "hotcoco", None)


def image_ids_are_names(monkeypatch, contents, detections):
    for record in contents["images"]:
        record["id"] = f"image {record['id']}"
    for annotation in contents["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    detections[:] = [(f"image {image}", instances) for image, instances in detections]


def same_id_twice(monkeypatch, contents, detections):
    contents["annotations"][1]["id"] = contents["annotations"][0]["id"]


def score_is_nan(monkeypatch, contents, detections):
    detections[0][1].scores[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hotcoco_not_installed, "`import hotcoco` fails, pip install"),
        pytest.param(image_ids_are_names, "ids are not whole numbers", marks=needs_hotcoco),
        pytest.param(same_id_twice, "two annotations have the same id", marks=needs_hotcoco),
        pytest.param(score_is_nan, "a detection is not finite", marks=needs_hotcoco),
    ],
)
def test_falls_back_to_pycocotools(dataset, monkeypatch, caplog, change, reason):
    """Where hotcoco would differ: the metrics stay equal, and the log says the reason."""
    contents, detections = scenes(2)
    change(monkeypatch, contents, detections)
    dataset(contents)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    results = evaluator_of(FastCOCOEvaluator, detections).evaluate()
    assert f"Evaluating with pycocotools: {reason}" in caplog.text
    assert_equal(results, evaluator_of(COCOEvaluator, detections).evaluate())


@needs_hotcoco
@pytest.mark.parametrize(
    "odd",
    [
        {"info": "a text", "licenses": None},
        {"licenses": [{"id": "CC", "url": None}]},
        {"images": {"file_name": None, "license": "CC", "height": "200"}},
        {"annotations": {"segmentation": None, "keypoints": "none", "iscrowd": True}},
        {"categories": {"name": None, "supercategory": 5, "keypoints": None}},
    ],
)
def test_fields_that_hotcoco_rejects_do_not_matter(dataset, caplog, odd):
    """hotcoco gets only the fields that matching reads."""
    contents, detections = scenes(4)
    for key, value in odd.items():
        if key in ("info", "licenses"):
            contents[key] = value
        else:
            contents[key][0] |= value
    dataset(contents)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    results = evaluator_of(FastCOCOEvaluator, detections).evaluate()
    assert "Evaluating with hotcoco" in caplog.text
    assert_equal(results, evaluator_of(COCOEvaluator, detections).evaluate())


def test_broken_extra_counts_as_not_installed(tmp_path, monkeypatch):
    """A module that was compiled for another system raises ImportError; the package does not."""
    (tmp_path / "for_another_system.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert optional_import("for_another_system") is None
    assert optional_import("not_installed_at_all") is None
    assert optional_import("json") is json


def test_annotation_without_bbox_raises(dataset):
    """The same KeyError as pycocotools'; hotcoco would assume a value. The doctor names it."""
    contents, detections = scenes(2)
    del contents["annotations"][3]["bbox"]
    dataset(contents)
    with pytest.raises(KeyError, match="bbox"):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


@pytest.mark.parametrize("missing", [("area",), ("iscrowd",), ("area", "iscrowd")])
@pytest.mark.parametrize("with_hotcoco", [True, False])
def test_missing_area_and_crowd_are_filled_in(dataset, monkeypatch, missing, with_hotcoco):
    """As if the file had the box's area and iscrowd 0; pycocotools would fail."""
    if not with_hotcoco:
        monkeypatch.setattr(coco, "hotcoco", None)
    contents, detections = scenes(2)
    for annotation in contents["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = 0
    dataset(contents)
    expected = evaluator_of(FastCOCOEvaluator, detections).evaluate()
    for annotation in contents["annotations"][::2]:
        for key in missing:
            del annotation[key]
    dataset(contents)
    for cls in (FastCOCOEvaluator, COCOEvaluator):
        assert_equal(evaluator_of(cls, detections).evaluate(), expected)


def both(detections):
    """The metrics of both evaluators."""
    return [evaluator_of(cls, detections).evaluate() for cls in (FastCOCOEvaluator, COCOEvaluator)]


@pytest.mark.parametrize("with_hotcoco", [pytest.param(True, marks=needs_hotcoco), False])
@pytest.mark.parametrize(
    "new",
    [lambda i: i - 1, lambda i: f"x{i}", lambda i: str(uuid.UUID(int=i)), lambda i: str(99 - i),
     lambda i: -i, lambda i: i + 2**60, lambda i: i / 2],
    ids=["from 0", "texts", "UUIDs", "numbers as texts", "negative", "large", "floats"],
)  # fmt: skip
def test_ids_of_annotations_do_not_matter(dataset, monkeypatch, caplog, new, with_hotcoco):
    """The metrics are pycocotools' of the file that is numbered from 1, which it reads rightly."""
    if not with_hotcoco:
        monkeypatch.setattr(coco, "hotcoco", None)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    for seed in range(3):
        contents, detections = scenes(seed)
        path = dataset(contents)
        expected = pycocotools_stats(path, detections)
        for annotation in contents["annotations"]:
            annotation["id"] = new(annotation["id"])
        dataset(contents)
        assert_statistics_of_both(detections, expected)
    assert ("Evaluating with hotcoco" in caplog.text) == with_hotcoco


def assert_statistics_of_both(detections, expected):
    """The 12 statistics of both evaluators, to the bit."""
    for cls in (FastWithSummary, SlowWithSummary):
        evaluator = evaluator_of(cls, detections)
        evaluator.evaluate()
        assert np.array_equal(evaluator.summary.stats, expected)


def pycocotools_stats(path, detections):
    """The 12 statistics, by pycocotools alone: no code of the plugin or of Detectron2."""
    truth = COCO(str(path))
    categories = sorted(truth.cats)
    results = [
        {"image_id": image, "category_id": categories[k], "score": score,
         "bbox": (box - np.array([0, 0, *box[:2]], np.float32)).tolist()}
        for image, found in detections
        for box, score, k in zip(
            found.pred_boxes.tensor.numpy(), found.scores.tolist(), found.pred_classes.tolist()
        )
    ]  # fmt: skip
    direct = COCOeval(truth, truth.loadRes(results), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    assert 0 < direct.stats[0] < 1  # not trivial
    return direct.stats


@pytest.mark.parametrize("with_hotcoco", [pytest.param(True, marks=needs_hotcoco), False])
def test_annotation_of_id_0_counts(dataset, monkeypatch, with_hotcoco):
    """pycocotools would give half of this AP: it takes the id 0 for "no match"."""
    if not with_hotcoco:
        monkeypatch.setattr(coco, "hotcoco", None)
    box = {"category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    dataset(
        {
            "images": [{"id": i, "file_name": "", "height": 99, "width": 99} for i in (1, 2)],
            "annotations": [{"id": i, "image_id": i + 1, **box} for i in (0, 1)],
            "categories": [{"id": 1, "name": "a"}],
        }
    )
    found = Instances(
        (99, 99),
        pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 50]])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([0]),
    )
    for result in both([(1, found), (2, found)]):
        assert result["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("with_hotcoco", [pytest.param(True, marks=needs_hotcoco), False])
@pytest.mark.parametrize("image_id", [-1, "1", "a.png", 10**6, 0.5])
def test_annotations_of_unknown_images_are_left_out(
    dataset, monkeypatch, caplog, image_id, with_hotcoco
):
    """The metrics are those of the file without them."""
    if not with_hotcoco:
        monkeypatch.setattr(coco, "hotcoco", None)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    contents, detections = scenes(2)
    path = dataset(contents)
    expected = pycocotools_stats(path, detections)
    for k, annotation in enumerate(copy.deepcopy(contents["annotations"][:3])):
        contents["annotations"].insert(k, {**annotation, "id": 1000 + k, "image_id": image_id})
    del contents["annotations"][0]["area"]
    contents["annotations"][0]["bbox"] = []  # nobody looks at it
    dataset(contents)
    assert_statistics_of_both(detections, expected)
    assert ("Evaluating with hotcoco" in caplog.text) == with_hotcoco


def test_byte_order_mark_does_not_matter(dataset):
    """Some programs write one in front of the file."""
    contents, detections = scenes(2)
    path = dataset(contents)
    expected = evaluator_of(FastCOCOEvaluator, detections).evaluate()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for cls in (FastCOCOEvaluator, COCOEvaluator):
        assert_equal(evaluator_of(cls, detections).evaluate(), expected)


def test_incomplete_annotation_of_another_image_does_not_raise(dataset):
    """pycocotools reads only the annotations of the images to evaluate."""
    contents, detections = scenes(2)
    first = contents["annotations"][0]
    del first["bbox"]
    dataset(contents)
    others = [image["id"] for image in contents["images"] if image["id"] != first["image_id"]]
    results = [
        evaluator_of(cls, detections).evaluate(img_ids=others)
        for cls in (FastCOCOEvaluator, COCOEvaluator)
    ]
    assert_equal(*results)


def test_no_images_give_no_results(dataset):
    """An empty data loader, as in Detectron2."""
    dataset(scenes(0)[0])
    assert evaluator_of(FastCOCOEvaluator, []).evaluate() == {}


def test_no_detections_give_nan(dataset, tmp_path):
    """Every metric is NaN, and the file is an empty list."""
    contents, detections = scenes(0)
    dataset(contents)
    empty = [(image, instances[:0]) for image, instances in detections]
    results = evaluator_of(FastCOCOEvaluator, empty, tmp_path).evaluate()
    expected = evaluator_of(COCOEvaluator, empty).evaluate()
    assert_equal(results, expected)
    assert (tmp_path / "coco_instances_results.json").read_text() == "[]"


def test_unknown_class_raises(dataset):
    """One line that names the number of classes to set."""
    contents, detections = scenes(4)
    contents["categories"].pop()
    dataset(contents)
    with pytest.raises(ConfigError, match=r"class 3, .* has 3 classes: set .*NUM_CLASSES 3"):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


def test_unknown_image_raises(dataset):
    """One line that names the image."""
    contents, detections = scenes(4)
    dataset(contents)
    detections = [(12345, instances) for _, instances in detections]
    with pytest.raises(ConfigError, match="image 12345"):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


@pytest.mark.parametrize("extra", ["pred_masks", "pred_keypoints", "proposals"])
def test_masks_keypoints_and_proposals_raise(dataset, extra):
    """The message names the evaluator that reads them."""
    contents, detections = scenes(4)
    dataset(contents)
    image_id, instances = max(detections, key=lambda d: len(d[1]))
    output = {"instances": instances}
    if extra == "proposals":
        output["proposals"] = instances
    else:
        instances.set(extra, torch.zeros(len(instances), 1))
    evaluator = evaluator_of(FastCOCOEvaluator, [])
    with pytest.raises(ConfigError, match=rf"{extra}: use COCOEvaluator in TEST\.EVALUATORS"):
        evaluator.process([{"image_id": image_id}], [output])


def test_instances_and_predictions_are_not_changed(dataset):
    """``process`` does not change the model's instances; ``evaluate`` can be called twice."""
    contents, detections = scenes(5)
    dataset(contents)
    evaluator = FastCOCOEvaluator(NAME)
    image_id, instances = max(detections, key=lambda d: len(d[1]))
    before = instances.pred_boxes.tensor.clone()
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    assert torch.equal(instances.pred_boxes.tensor, before)
    assert_equal(evaluator.evaluate(), evaluator.evaluate())
