"""The rules of `retina init` as properties, and the file that it writes."""

import dataclasses
import itertools

import numpy as np
import pytest
import yaml

from retina_plugin.doctor import StepCost
from retina_plugin.doctor.config import check_config
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.engine import setup_cfg
from retina_plugin.recipe import Facts, Recipe, model, schedule
from retina_plugin.recipe.decide import _timed_config

BASE = "retina_R50_600.yaml"
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_retina_fpn_backbone"]


def facts(sides=(40, 160), shape=(480, 640), images=50, boxes=4, names=("cat", "dog"), ratio=1.0):
    """Images with boxes whose lengths are log-uniform between ``sides`` (pixels)."""
    rng, records = np.random.default_rng(0), []
    for i in range(images):
        length = np.exp(rng.uniform(*np.log(sides), boxes))
        wh = np.stack([length / ratio**0.5, length * ratio**0.5], axis=1)
        corner = rng.uniform(size=(boxes, 2)) * np.maximum(np.array(shape[::-1]) - wh, 0)
        annotations = [
            {"bbox": [*c, *s], "bbox_mode": 1, "category_id": k % len(names)}
            for k, (c, s) in enumerate(zip(corner.tolist(), wh.tolist()))
        ]
        records.append({"file_name": f"{i}.jpg", "height": shape[0], "width": shape[1]})
        records[-1]["annotations"] = annotations
    return Facts("train", tuple(names), GroundTruth.from_records(records), images, 0)


def recipe(*opts, base=BASE):
    opts = ["MODEL.DEVICE", "cpu", *map(str, opts)]
    return Recipe(base, setup_cfg(base, opts), frozenset(opts[2::2]))


def cost(memory=2.0, images=2, processes=1):
    return StepCost(1.0, int(memory * 2**30), 24 * 2**30, images, processes, "cpu")


def test_a_set_like_coco_gets_about_the_papers_settings():
    coco = dataclasses.replace(facts((9, 400), images=200), images=118_287)
    ours = recipe("MODEL.WEIGHTS", "r50.pkl")
    model.decide_image_size(ours, coco)
    planned = schedule.plan(coco, False, 0.1, None)
    schedule.decide_batch(ours, planned, cost(1.0))
    schedule.decide_rate(ours, 0.01, 16)
    schedule.decide_schedule(ours, coco, planned, 0.1, "cpu")
    paper = setup_cfg(BASE).SOLVER
    assert ours.cfg.INPUT.MIN_SIZE_TRAIN == (600,)
    for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS"):
        assert ours.cfg.SOLVER[key] == paper[key], key


@pytest.mark.parametrize("images", [1, 7, 300, 3000, 118_287])
def test_iterations_are_epochs_times_images_over_the_batch(images):
    one = dataclasses.replace(facts(), images=images)
    ours = recipe("MODEL.WEIGHTS", "r50.pkl")
    planned = schedule.plan(one, False, 0.1, None)
    schedule.decide_batch(ours, planned, cost())
    schedule.decide_schedule(ours, one, planned, 0.1, "cpu")
    solver = ours.cfg.SOLVER
    assert solver.MAX_ITER * solver.IMS_PER_BATCH == pytest.approx(
        schedule.drawn_images(images, False), abs=solver.IMS_PER_BATCH
    )
    assert 0 <= solver.WARMUP_ITERS < solver.STEPS[0] < solver.STEPS[1] < solver.MAX_ITER


def test_smaller_sets_get_more_epochs_but_fewer_iterations():
    sizes = np.array([1, 10, 1000, 118_287])
    drawn = np.array([schedule.drawn_images(int(n), False) for n in sizes])
    assert (np.diff(drawn) > 0).all() and (np.diff(drawn / sizes) < 0).all()
    assert schedule.drawn_images(50, True) > schedule.drawn_images(50, False)


@pytest.mark.parametrize("batch", [2, 4, 16, 64])
def test_the_learning_rate_is_linear_in_the_batch(batch):
    ours = recipe("SOLVER.IMS_PER_BATCH", batch, "MODEL.WEIGHTS", "r50.pkl")
    schedule.decide_rate(ours, 0.01, 16)
    assert pytest.approx(0.01 * batch / 16) == ours.cfg.SOLVER.BASE_LR


@pytest.mark.parametrize("hours", [0.001, 0.1, 5.0])
def test_hours_hold_training_and_evaluation(hours):
    some = dataclasses.replace(facts(), images=3000, val="val", val_images=30)
    planned = schedule.plan(some, False, 0.5, hours)
    evaluation = planned.evaluations * 30 * 0.5 / 3
    at_least_one = 0.5 + 30 * 0.5 / 3  # an image, and the evaluation at the end
    assert planned.drawn * 0.5 + evaluation <= max(hours * 3600, at_least_one) + 1e-6
    assert planned.is_cut and planned.evaluations >= 1


def test_less_memory_makes_the_batch_smaller_and_never_zero():
    planned = schedule.Plan(1e6, 0)
    batches = []
    for memory in (0.1, 6.0, 23.0):
        ours = recipe("MODEL.WEIGHTS", "r50.pkl")
        schedule.decide_batch(ours, planned, cost(memory))
        batches.append(ours.cfg.SOLVER.IMS_PER_BATCH)
    assert batches == [16, 4, 2]


def test_the_batch_can_be_divided_among_processes():
    ours = recipe("MODEL.WEIGHTS", "r50.pkl")
    schedule.decide_batch(ours, schedule.Plan(100, 0), cost(processes=3))
    assert ours.cfg.SOLVER.IMS_PER_BATCH % 3 == 0


def test_the_step_that_is_timed_is_of_two_images_a_process():
    """Also where the training scales its batch."""
    cfg = recipe("SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.ACCUMULATE", 2).cfg
    timed = _timed_config(cfg, 3).SOLVER
    assert (timed.IMS_PER_BATCH, timed.REFERENCE_WORLD_SIZE) == (12, 0)
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 4


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["MODEL.RESNETS.NORM", "BN"], 4),
        (["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.TIMM.NORM", "BN"], 2),  # timm's is not read
        ([*TIMM, "MODEL.TIMM.NORM", "BN"], 4),
        ([*TIMM, "MODEL.TIMM.NORM", "FrozenBN", "MODEL.RESNETS.NORM", "BN"], 2),
        ([*TIMM, "MODEL.TIMM.NORM", "BN", "SOLVER.ACCUMULATE", 2], 8),  # 4 a pass
    ],
)
def test_batch_norm_gets_four_images(options, least):
    """However few the training draws."""
    others = ["MODEL.FPN.NORM", "GN", "MODEL.RETINANET.NORM", "GN"]
    batch, _ = schedule.batch_size(recipe(*others, *options).cfg, drawn=100, holds=16, processes=1)
    assert batch == least


@pytest.mark.parametrize(
    ("given", "sizes", "sampling"),
    [
        ([], 1, "choice"),
        (["INPUT.MIN_SIZE_TRAIN", "(320, 480)"], 2, "range"),
        (["INPUT.MIN_SIZE_TRAIN", "(320,)"], 1, "choice"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], 2, "range"),
    ],
)
def test_one_size_is_no_range(tmp_path, given, sizes, sampling):
    """Of a base that draws sizes from a range."""
    base = tmp_path / "base.yaml"
    sizes_of_base = "{MIN_SIZE_TRAIN: [400, 600], MIN_SIZE_TRAIN_SAMPLING: range}"
    base.write_text(f'_BASE_: "{BASE}"\nINPUT: {sizes_of_base}\n')
    ours = recipe(*given, base=str(base))
    model.decide_image_size(ours, facts())
    decided = ours.cfg.INPUT
    assert (len(decided.MIN_SIZE_TRAIN), decided.MIN_SIZE_TRAIN_SAMPLING) == (sizes, sampling)
    assert ours.cfg.INPUT.MIN_SIZE_TEST == max(decided.MIN_SIZE_TRAIN)
    assert ('MIN_SIZE_TRAIN_SAMPLING: "choice"' in ours.yaml()) == (sampling == "choice")
    keys = [finding.where for finding in check_config(ours.cfg)]
    assert not any(key.startswith("INPUT.MIN_SIZE_TRAIN") for key in keys)


@pytest.mark.parametrize(
    ("names", "flip"),
    [
        (("cat", "dog"), "horizontal"),
        (tuple("0123456789"), "none"),
        (("turn left", "turn right"), "none"),
        (("licence plate",), "none"),
    ],
)
def test_flips_follow_the_class_names(names, flip):
    ours = recipe()
    model.decide_flips(ours, facts(names=names))
    assert flip == ours.cfg.INPUT.RANDOM_FLIP


@pytest.mark.parametrize("sides", [(4, 8), (20, 40), (100, 400), (2000, 4000)])
@pytest.mark.parametrize("shape", [(160, 160), (480, 640), (3000, 4000), (100, 3000)])
def test_images_are_neither_tiny_nor_enlarged_more_than_twice(sides, shape):
    size, why = model.best_size(facts(sides, shape, images=5), 600)
    assert min(min(shape), 600) <= size <= max(2 * min(shape), 32) and size <= 1344 and why


def test_small_boxes_ask_for_larger_images():
    assert model.best_size(facts((8, 12)), 600)[0] > model.best_size(facts((40, 160)), 600)[0]


def test_anchors_of_long_boxes_fit_better_than_the_bases():
    long = facts((40, 160), ratio=8.0, names=("rod",))
    ours = recipe("MODEL.RETINANET.NUM_CLASSES", 1)
    model.decide_anchors(ours, long)
    ratios = ours.cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]
    assert max(ratios) > 4 and len(set(ratios)) == len(ratios)


def test_weights_that_cannot_be_had_make_a_model_that_trains_from_scratch():
    ours = recipe()
    model.decide_weights(ours, "no network")
    cfg = ours.cfg
    assert cfg.MODEL.WEIGHTS == "" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert {cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM} == {"GN"}
    assert "no network" in ours.warnings[0] and "R-50.pkl" in ours.yaml()


def test_weights_that_can_be_had_change_nothing():
    ours = recipe()
    model.decide_weights(ours, "")
    assert ours.cfg == recipe().cfg and not ours.warnings


def test_given_keys_stay_and_the_rest_follows_them():
    ours = recipe("INPUT.MIN_SIZE_TRAIN", "(320,)", "SEED", 5)
    model.decide_image_size(ours, facts((8, 12)))
    assert ours.cfg.INPUT.MIN_SIZE_TRAIN == (320,) and ours.cfg.INPUT.MIN_SIZE_TEST == 320
    assert "SEED: 5" in ours.yaml()


def test_the_file_is_what_was_decided_and_every_key_has_a_comment(tmp_path):
    ours = recipe()
    some = facts(names=("größer: #1", 'a "b"\nc'))
    model.decide_classes(ours, some)
    model.decide_weights(ours, "no network")
    model.decide_image_size(ours, some)
    model.decide_anchors(ours, some)
    model.decide_flips(ours, some)
    path = tmp_path / "ours.yaml"
    path.write_text(ours.yaml(), encoding="utf-8")
    written = setup_cfg(str(path), ["MODEL.DEVICE", "cpu"])
    written.OUTPUT_DIR = ours.cfg.OUTPUT_DIR
    assert written == ours.cfg
    lines = path.read_text().splitlines()
    assert yaml.safe_load(path.read_text())["_BASE_"] == BASE
    for above, line in itertools.pairwise(lines):
        key = line.strip().partition(":")[0]
        if any(setting.key.endswith(f".{key}") for setting in ours.settings.values()):
            assert above.strip().startswith("#"), line
