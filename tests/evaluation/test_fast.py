"""The fast evaluator gives pycocotools' numbers to the last bit, on ties and edges too."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import COCOEvaluator, FastCOCOEvaluator, coco
from retina_plugin.evaluation.detections import optional, orjson

NAME = "test_fast_evaluator"
HOTCOCO = coco.hotcoco
needs_hotcoco = pytest.mark.skipif(HOTCOCO is None, reason="the extra 'fast' is not installed")


def scenes(seed, images=8, classes=4, ties=True, most=20):
    """A COCO dict and the detections (image id, Instances), with all that matching turns on.

    Sides of 32 and 96 (areas on the limits), equal boxes, scores from few values, crowds, classes
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
                    # by the box, or of a mask: on the limits, a bit over them, none
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
    """dataset(contents) registers a COCO dict under NAME."""

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
    """The evaluator after it has seen the detections."""
    if cls is COCOEvaluator:
        options["tasks"] = ("bbox",)
    evaluator = cls(NAME, output_dir=output_dir and str(output_dir), **options)
    evaluator.reset()
    for image_id, instances in detections:
        evaluator.process([{"image_id": image_id}], [{"instances": copy.deepcopy(instances)}])
    return evaluator


def assert_equal(results, expected):
    """To the bit, in the same order, NaN where NaN is."""
    assert list(results) == list(expected)
    assert list(results["bbox"]) == list(expected["bbox"])
    np.testing.assert_array_equal(
        list(results["bbox"].values()), list(expected["bbox"].values()), strict=True
    )


@needs_hotcoco
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_dets_per_image": 5}, {"max_dets_per_image": 300}])
def test_the_numbers_are_detectron2s(dataset, caplog, ties, options):
    """Every metric and every class, over random scenes, without a fallback."""
    caplog.set_level(logging.DEBUG, "retina_plugin")
    for seed in range(8):
        contents, detections = scenes(seed, ties=ties)
        dataset(contents)
        expected = evaluator_of(COCOEvaluator, detections, use_fast_impl=False, **options)
        fast = evaluator_of(FastCOCOEvaluator, detections, **options)
        caplog.clear()
        assert_equal(fast.evaluate(), expected.evaluate())
        assert "Evaluating with hotcoco" in caplog.text
        first, second = (image["id"] for image in contents["images"][:2])
        # a new one: Detectron2's can evaluate only once what it has been given
        expected = evaluator_of(COCOEvaluator, detections, use_fast_impl=False, **options)
        wanted = [second, first, second]
        assert_equal(fast.evaluate(img_ids=wanted), expected.evaluate(img_ids=wanted))


@needs_hotcoco
@pytest.mark.parametrize("most", [20, 260])
def test_all_statistics_and_arrays(dataset, most):
    """The 12 statistics and the precision, recall and score arrays are pycocotools'."""
    for seed in range(6):
        contents, detections = scenes(seed, ties=seed % 2 == 0, most=most)
        path = dataset(contents)
        evaluator = evaluator_of(FastCOCOEvaluator, detections)
        predictions = evaluator._predictions
        category_ids = evaluator._category_ids(predictions)
        summary = evaluator._summarize(predictions, category_ids, None)
        results = [r for p in predictions for r in p.to_json(category_ids)]
        truth = COCO(str(path))
        direct = _evaluate_predictions_on_coco(truth, results, "bbox", cocoeval_fn=COCOeval)
        assert np.array_equal(summary.stats, direct.stats) and len(direct.stats) == 12
        for array in ("precision", "recall", "scores"):
            assert np.array_equal(summary.eval[array], direct.eval[array])
        assert 0 < direct.stats[0] < 1  # neither trivial


@pytest.mark.parametrize("with_orjson", [True, False])
def test_the_file_is_detectron2s(dataset, tmp_path, monkeypatch, with_orjson):
    """The same list of results, number by number; NaN is written as Detectron2 writes it."""
    if not with_orjson:
        monkeypatch.setattr("retina_plugin.evaluation.detections.orjson", None)
    elif orjson is None:
        pytest.skip("the extra 'fast' is not installed")
    contents, detections = scenes(1, ties=False)
    del contents["annotations"]  # as test-dev: the file is the result
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


def not_installed(monkeypatch, contents, detections):
    monkeypatch.setattr(coco, "hotcoco", None)


def id_zero(monkeypatch, contents, detections):
    for annotation in contents["annotations"]:
        annotation["id"] -= 1


def names_as_ids(monkeypatch, contents, detections):
    for record in contents["images"]:
        record["id"] = f"image {record['id']}"
    for annotation in contents["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    detections[:] = [(f"image {image}", instances) for image, instances in detections]


def one_id_twice(monkeypatch, contents, detections):
    contents["annotations"][1]["id"] = contents["annotations"][0]["id"]


def not_a_number(monkeypatch, contents, detections):
    detections[0][1].scores[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (not_installed, "`import hotcoco` fails, pip install"),
        pytest.param(id_zero, "an annotation has id 0", marks=needs_hotcoco),
        pytest.param(names_as_ids, "ids are not whole numbers", marks=needs_hotcoco),
        pytest.param(one_id_twice, "two annotations have one id", marks=needs_hotcoco),
        pytest.param(not_a_number, "a detection isn't finite", marks=needs_hotcoco),
    ],
)
def test_pycocotools_where_hotcoco_would_not_do(dataset, monkeypatch, caplog, change, reason):
    """The numbers stay Detectron2's, and the log says which library it was and why."""
    contents, detections = scenes(2)
    change(monkeypatch, contents, detections)
    dataset(contents)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    results = evaluator_of(FastCOCOEvaluator, detections).evaluate()
    assert f"Evaluating with pycocotools: {reason}" in caplog.text
    expected = evaluator_of(COCOEvaluator, detections, use_fast_impl=False).evaluate()
    assert_equal(results, expected)


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
def test_files_that_only_pycocotools_reads(dataset, caplog, odd):
    """What matching doesn't read may be anything: hotcoco never sees it."""
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
    assert_equal(results, evaluator_of(COCOEvaluator, detections, use_fast_impl=False).evaluate())


def test_a_broken_extra_is_like_none(tmp_path, monkeypatch):
    """A compiled module of another system raises ImportError: importing us must not."""
    (tmp_path / "of_another_system.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert optional("of_another_system") is None and optional("not_there_at_all") is None
    assert optional("json") is json


@pytest.mark.parametrize("missing", ["bbox", "area", "iscrowd"])
def test_an_incomplete_annotation_is_not_guessed_at(dataset, missing):
    """It is pycocotools' error, with the field's name."""
    contents, detections = scenes(2)
    del contents["annotations"][3][missing]
    dataset(contents)
    with pytest.raises(KeyError, match=missing):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


def test_what_is_not_evaluated_may_be_incomplete(dataset):
    """A box that is missing in an image that isn't asked for: pycocotools doesn't look at it."""
    contents, detections = scenes(2)
    first = contents["annotations"][0]
    del first["bbox"]
    dataset(contents)
    wanted = [image["id"] for image in contents["images"] if image["id"] != first["image_id"]]
    results = [
        evaluator_of(cls, detections, **options).evaluate(img_ids=wanted)
        for cls, options in ((FastCOCOEvaluator, {}), (COCOEvaluator, {"use_fast_impl": False}))
    ]
    assert_equal(*results)


def test_use_fast_false_is_pycocotools(dataset, caplog):
    """Asked for by whoever constructs it."""
    contents, detections = scenes(3)
    dataset(contents)
    caplog.set_level(logging.DEBUG, "retina_plugin")
    evaluator_of(FastCOCOEvaluator, detections, use_fast=False).evaluate()
    assert "Evaluating with pycocotools: use_fast is False" in caplog.text


def test_nothing_was_processed(dataset):
    """An empty loader: no results, as Detectron2 has it."""
    dataset(scenes(0)[0])
    assert evaluator_of(FastCOCOEvaluator, []).evaluate() == {}


def test_nothing_was_detected(dataset, tmp_path):
    """NaN for each metric, and an empty file."""
    contents, detections = scenes(0)
    dataset(contents)
    nothing = [(image, instances[:0]) for image, instances in detections]
    results = evaluator_of(FastCOCOEvaluator, nothing, tmp_path).evaluate()
    expected = evaluator_of(COCOEvaluator, nothing).evaluate()
    assert_equal(results, expected)
    assert (tmp_path / "coco_instances_results.json").read_text() == "[]"


def test_a_class_that_the_dataset_has_not(dataset):
    """One line that names the number of classes to set."""
    contents, detections = scenes(4)
    contents["categories"].pop()
    dataset(contents)
    with pytest.raises(ConfigError, match=r"class 3, .* has 3 classes: set .*NUM_CLASSES 3"):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


def test_an_image_that_the_dataset_has_not(dataset):
    """One line that names it."""
    contents, detections = scenes(4)
    dataset(contents)
    detections = [(12345, instances) for _, instances in detections]
    with pytest.raises(ConfigError, match="image 12345"):
        evaluator_of(FastCOCOEvaluator, detections).evaluate()


@pytest.mark.parametrize("extra", ["pred_masks", "pred_keypoints", "proposals"])
def test_what_is_not_boxes_is_refused(dataset, extra):
    """Masks, keypoints and proposals would go unseen; the message names the other evaluator."""
    contents, detections = scenes(4)
    dataset(contents)
    image_id, instances = max(detections, key=lambda d: len(d[1]))
    output = {"instances": instances}
    if extra == "proposals":
        output["proposals"] = instances
    else:
        instances.set(extra, torch.zeros(len(instances), 1))
    evaluator = evaluator_of(FastCOCOEvaluator, [])
    with pytest.raises(ConfigError, match=rf"{extra}: set TEST\.EVALUATOR COCOEvaluator"):
        evaluator.process([{"image_id": image_id}], [output])


def test_predictions_are_left_alone(dataset):
    """The model's instances are not changed, nor is what process keeps by evaluate."""
    contents, detections = scenes(5)
    dataset(contents)
    evaluator = FastCOCOEvaluator(NAME)
    image_id, instances = max(detections, key=lambda d: len(d[1]))
    before = instances.pred_boxes.tensor.clone()
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    assert torch.equal(instances.pred_boxes.tensor, before)
    assert_equal(evaluator.evaluate(), evaluator.evaluate())
