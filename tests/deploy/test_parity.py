"""The comparison finds every kind of difference, and says where."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from retina_plugin.deploy import DenseModel
from retina_plugin.deploy.parity import compare, parity_sizes, table


@pytest.fixture
def run_of():
    """run_of(model, stage, change): a file's function, whose outputs ``change`` edits."""

    def make(model, stage="nms", change=lambda found: None):
        dense = DenseModel(model, stage).eval()

        @torch.no_grad()
        def run(pixels):
            found = dict(
                zip(dense.output_names, [x.numpy() for x in dense(torch.from_numpy(pixels))])
            )
            change(found)
            return found

        return run

    return make


@pytest.fixture
def images(noise):
    return [x.permute(1, 2, 0).byte().numpy() for x in noise(4, 50, 60)]


def check(run, model, metadata, images):
    return compare(run, model, metadata, images, sizes=[(64, 80), (41, 33)], seconds=0)


@pytest.mark.parametrize("stage", ["nms", "boxes", "head"])
def test_equal_files_have_no_difference(detector, metadata_of, run_of, images, stage):
    cfg, model = detector()
    results = check(run_of(model, stage), model, metadata_of(cfg, model, stage), images)
    assert [(x.batch, x.height, x.width) for x in results] == [
        *[(1, 64, 80), (3, 64, 80)],
        *[(1, 41, 33), (3, 41, 33)],
    ]
    assert all(x.where == "" for x in results)
    # the sigmoid of a tensor of another shape may differ in the last bit
    assert max(max(x.differences.values()) for x in results) < 1e-6
    names = {"nms": ["boxes", "scores"], "boxes": ["boxes", "scores"], "head": ["logits", "deltas"]}
    assert all(list(x.differences) == names[stage] for x in results)
    if stage == "nms":
        assert all(x.matched == x.detections > 0 for x in results)
    assert len(table(results).splitlines()) == 5


def add(name, place, by):
    def change(found):
        found[name][place] += by

    return change


def other_classes(found):
    found["classes"][0, :3] = (found["classes"][0, :3] + 1) % 10


def drop_first(found):
    for array in found.values():
        array[0, :-3] = array[0, 3:].copy()


CHANGES = {
    "box": (add("boxes", (0, 2, 1), 0.03), r"boxes of detection 2 .* differ by 0.03 .*0.02"),
    "score": (add("scores", (0, 1), 0.001), r"scores of detection 1 .* differ by 0.001"),
    "class": (other_classes, r"image 0: the file lacks detection 0 \(дзета"),
    "missing": (drop_first, r"image 0: the file lacks detection 0 \(дзета \d, score 0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_differences_of_detections_are_named(detector, metadata_of, run_of, images, name):
    cfg, model = detector("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2")
    change, message = CHANGES[name]
    run = run_of(model, change=change)
    results = check(run, model, metadata_of(cfg, model), images[:1])
    assert results[0].where.startswith("image 0: ")
    assert all(x.where for x in results)
    assert re.search(message, results[0].where), results[0].where


def test_detections_at_the_threshold_may_differ(detector, metadata_of, run_of, images):
    """A rounding decides whether they are there."""
    cfg, model = detector()
    metadata = metadata_of(cfg, model)
    border = run_of(model)(images[0].transpose(2, 0, 1)[None].astype(np.float32))["scores"][0, 5]
    model.inference.score_thresh = float(border) - 5e-5
    metadata = dataclasses.replace(metadata, score_thresh=model.inference.score_thresh)

    def lose(found):
        found["classes"][:, 5:] = -1

    (result,) = compare(
        run_of(model, change=lose),
        model,
        metadata,
        images[:1],
        sizes=[(50, 60)],
        batches=[1],
        seconds=0,
    )
    assert result.where == "" and result.detections == result.matched == 5


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("boxes", "scores", r"scores at \[0, 0, 0\] differs by 0.5 \(allowed: 0.0001\)"),
        ("head", "logits_p4", r"logits_p4 at \[0, 0, 0, 0\] differs by "),
        ("head", "deltas_p7", r"deltas_p7 at \[0, 0, 0, 0\] differs by nan|inf"),
    ],
)
def test_differences_of_tensors_are_named(
    detector, metadata_of, run_of, images, stage, name, message
):
    cfg, model = detector()
    by = np.nan if name == "deltas_p7" else 0.5
    run = run_of(model, stage, add(name, (0,) * (3 if stage == "boxes" else 4), by))
    for result in check(run, model, metadata_of(cfg, model, stage), images):
        assert re.search(message, result.where)


def test_missing_rows_are_named(detector, metadata_of, run_of, images):
    cfg, model = detector()

    def cut(found):
        found["boxes"] = found["boxes"][:, :-1]

    results = check(run_of(model, "boxes", cut), model, metadata_of(cfg, model, "boxes"), images)
    assert results[0].where.startswith("boxes has the shape (1, ")


def test_sizes_are_around_the_test_size():
    """Three of them, two that need padding, none above the largest."""
    assert parity_sizes(800, 1333) == [(800, 1066), (641, 481), (1003, 1003)]
    assert parity_sizes(160, 160) == [(160, 160), (129, 97), (157, 157)]
    assert parity_sizes(2, 3) == [(2, 2), (2, 2), (1, 1)]
    assert parity_sizes(0, 0) == [(600, 800), (481, 361), (753, 753)]
