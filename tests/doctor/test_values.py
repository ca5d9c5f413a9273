"""Values that a key cannot have: one line with the key, what it must be, and the value."""

import math

import pytest

from retina_plugin.config import flatten
from retina_plugin.doctor import quick_checks
from retina_plugin.doctor.values import check_values
from retina_plugin.engine import check_config
from retina_plugin.errors import ConfigError

NAN, INF = math.nan, math.inf
SHARES = (-0.1, 1.1, NAN, INF, "a", None)
COUNTS = (0, -1, NAN, INF, 1.5, "a", None, True)
BAD = {
    "DATALOADER.NUM_WORKERS": (-1, NAN, 0.5, None),
    "DATALOADER.ON_BAD_IMAGE": ("ignore", None),
    "DATALOADER.SAMPLER_TRAIN": ("x", None),
    "INPUT.MAX_SIZE_TEST": COUNTS,
    "INPUT.MAX_SIZE_TRAIN": COUNTS,
    "INPUT.MIN_SIZE_TEST": (-1, NAN, None),
    "INPUT.MIN_SIZE_TRAIN": ((), (-1,), (800, -1), (NAN,), ("a",), None, 800),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("x",),
    "INPUT.RANDOM_FLIP": ("x", True),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ([], [[]], [[-0.5]], [[0]], [[NAN]], [[INF]], [1, [2]]),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (-0.1, 1.0, NAN),
    "MODEL.ANCHOR_GENERATOR.SIZES": ([], [[]], [[32], []], [[0]], [[-1]], [["a"]], None, [[NAN]]),
    "MODEL.BACKBONE.FREEZE_AT": (-1, 6, NAN),
    "INPUT.FORMAT": (None,),
    "MODEL.DEVICE": ("foo", "cuda:x", "", 0, None),
    "MODEL.FPN.FUSE_TYPE": ("foo", None),
    "MODEL.FPN.IN_FEATURES": (None,),
    "MODEL.FPN.NORM": ("Foo", 1),
    "MODEL.FPN.OUT_CHANNELS": COUNTS,
    "MODEL.RESNETS.DEPTH": (19, "50", None),
    "MODEL.RESNETS.NORM": ("Foo", 1),
    "MODEL.PIXEL_MEAN": ([], [NAN] * 3, ["a"] * 3, [INF] * 3),
    "MODEL.PIXEL_STD": ([1, 0, 1], [1, -1, 1], [NAN] * 3, [], [INF] * 3),
    "MODEL.RETINANET.ALPHA_PER_CLASS": ((1.5,), (-1,), (NAN,), ("a",), None),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": ((1, 1, 1), (1, 1, 1, 0), (1, 1, 1, NAN), 1.0),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": (1.5, NAN, INF, "a"),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": (-1, NAN, INF, None),
    "MODEL.RETINANET.FOCAL_STAR_GAMMA": (0, -1, NAN),
    "MODEL.RETINANET.HINGE_MARGIN": (0, 1.1, NAN),
    "MODEL.RETINANET.IGNORE_IOF_THRESH": (0, 1.1, NAN, "a"),
    "MODEL.RETINANET.IN_FEATURES": ([], None),
    "MODEL.RETINANET.IOU_LABELS": ([0, 2, 1], [1, 0, 1], [], ["a"], None),
    "MODEL.RETINANET.IOU_THRESHOLDS": ([0.5, 0.4], [0.4, 0.4], [-0.1, 0.5], [NAN, 0.5], None),
    "MODEL.RETINANET.NMS_THRESH_TEST": SHARES,
    "MODEL.RETINANET.NORM": ("gn", 1),
    "MODEL.RETINANET.NUM_CLASSES": COUNTS,
    "MODEL.RETINANET.NUM_CONVS": (-1, NAN, None),
    "MODEL.RETINANET.OHEM.BATCH_SIZE": COUNTS,
    "MODEL.RETINANET.OHEM.NMS_THRESH": SHARES,
    "MODEL.RETINANET.OHEM.POSITIVE_FRACTION": (0, -1, 1.5, NAN),
    "MODEL.RETINANET.PRIOR_PROB": (0, 1, -0.1, NAN, None),
    "MODEL.RETINANET.SCORE_THRESH_TEST": (-0.1, 1, NAN),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": (-1, NAN, INF),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNTS,
    "SEED": (2**32, 1.5, None),
    "SOLVER.ACCUMULATE": COUNTS,
    "SOLVER.BASE_LR": (0, -0.03, NAN, INF, "a", None, True),
    "SOLVER.BIAS_LR_FACTOR": (-1, NAN),
    "SOLVER.CHECKPOINT_PERIOD": COUNTS,
    "SOLVER.GAMMA": (0, -1, NAN),
    "SOLVER.IMS_PER_BATCH": COUNTS,
    "SOLVER.LR_SCHEDULER_NAME": ("x",),
    "SOLVER.MAX_ITER": COUNTS,
    "SOLVER.MOMENTUM": (-0.1, 1, NAN),
    "SOLVER.REFERENCE_WORLD_SIZE": (-1,),
    "SOLVER.STEPS": ((0,), (-5,), (20, 10), (10, 10), (NAN,), (1.5,), ("a",), None, 10),
    "SOLVER.WARMUP_FACTOR": SHARES,
    "SOLVER.WARMUP_ITERS": (-1, NAN, 0.5, None),
    "SOLVER.WARMUP_METHOD": ("x",),
    "SOLVER.WEIGHT_DECAY": (-1, NAN, None),
    "SOLVER.WEIGHT_DECAY_BIAS": (-1, NAN),
    "SOLVER.WEIGHT_DECAY_NORM": (-1, NAN),
    "TEST.AUG.ENABLED": ("yes", 1, None),
    "TEST.AUG.MERGE": ("x", None),
    "TEST.DETECTIONS_PER_IMAGE": COUNTS,
    "TEST.EVAL_PERIOD": (-1, NAN, None),
    "TEST.EXPECTED_RESULTS": (None,),
    "TEST.MERGE": ("x", None),
    "TRACKING": ("wandb", ("wandb", "wandb"), ("comet",), None, (1,)),
    "VIS_PERIOD": (-1, NAN, None),
}


def set_key(cfg, key, value):
    *path, leaf = key.split(".")
    for name in path:
        cfg = cfg[name]
    cfg[leaf] = value  # also what the command line would refuse: a config may be made in Python


def errors(cfg, **kwargs):
    return [str(f) for f in quick_checks(cfg, **kwargs) if f.severity == "error"]


@pytest.mark.parametrize("key", BAD)
def test_impossible_value_raises(tiny_cfg, key):
    """One line, with the key and the value, whatever else would follow from it."""
    for value in BAD[key]:
        set_key(tiny_cfg, key, value)
        with pytest.raises(ConfigError) as error:
            check_config(tiny_cfg)
        line = str(error.value)
        assert line.startswith(f"{key}: ") and "\n" not in line, (value, line)
        assert repr(value) in line or str(value) in line, (value, line)
        assert list(check_values(tiny_cfg, False)), value


GOOD = [
    ("INPUT.MIN_SIZE_TEST", 0),  # Detectron2: no resizing
    ("TEST.EVAL_PERIOD", 0),  # Detectron2: at the end only
    ("SEED", -1),
    ("SOLVER.WARMUP_ITERS", 0),
    ("SOLVER.STEPS", ()),
    ("DATALOADER.NUM_WORKERS", 0),
    ("MODEL.RETINANET.NUM_CONVS", 0),
    ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", -1),  # Detectron2: no weighting
    ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", None),
    ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0),
    ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.5, 64]]),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [32, 64.5]),  # Detectron2: of all levels
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [0.5, 1, 2]),
    ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
    ("DATALOADER.SAMPLER_TRAIN", "WeightedCategoryTrainingSampler"),
    ("MODEL.PIXEL_STD", [57.0, 57, 57]),
    ("MODEL.PIXEL_MEAN", [-1, 0, 1.5]),
    ("SOLVER.MOMENTUM", 0),
    ("SOLVER.BIAS_LR_FACTOR", None),
    ("MODEL.FPN.NORM", None),  # Detectron2: no norm
    ("MODEL.FPN.NORM", "LN"),
    ("MODEL.FPN.FUSE_TYPE", "avg"),
    ("MODEL.RETINANET.NORM", ""),
    ("MODEL.RETINANET.NORM", "naiveSyncBN"),
    ("MODEL.RESNETS.NORM", ""),
    ("MODEL.RESNETS.OUT_FEATURES", ["stem", "res2", "res3", "res4", "res5"]),
    ("MODEL.DEVICE", "cuda:1"),
    ("MODEL.DEVICE", "meta"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "DetectronAnchorGenerator"),
    ("MODEL.WEIGHTS", None),
    ("CUDNN_BENCHMARK", None),
]


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_possible_value_passes(tiny_cfg, key, value):
    """The edges of what Detectron2 allows."""
    set_key(tiny_cfg, key, value)
    assert errors(tiny_cfg) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["SOLVER.STEPS", (2,)], "SOLVER.STEPS: 2 is SOLVER.MAX_ITER: "),
        (["MODEL.RETINANET.IOU_LABELS", [0, 1]], "MODEL.RETINANET.IOU_LABELS: must be 3 labels"),
        (["MODEL.RETINANET.IOU_THRESHOLDS", [0.5]], "MODEL.RETINANET.IOU_LABELS: must be 2 labels"),
        (["MODEL.PIXEL_STD", [1.0]], "MODEL.PIXEL_STD: has 1 numbers, but MODEL.PIXEL_MEAN has 3"),
        (["INPUT.FORMAT", "L"], "MODEL.PIXEL_MEAN: has 3 numbers, but INPUT.FORMAT L has 1 "),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [9]]], "MODEL.ANCHOR_GENERATOR.SIZES: has 2 lists"),
        (
            ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [2.0]]],
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS: has 2 lists",
        ),
        (["MODEL.RETINANET.ALPHA_PER_CLASS", (0.5,)], "ALPHA_PER_CLASS: has 1 numbers for 10 cla"),
        (["SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0], "SOLVER.NESTEROV: needs momentum"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1.0],
            "SOLVER.BASE_LR_END: must be a number from 0 to SOLVER.BASE_LR 0.00125, got 1.0",
        ),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", 3, "SOLVER.IMS_PER_BATCH", 8],
            "SOLVER.REFERENCE_WORLD_SIZE: 3 processes cannot share SOLVER.IMS_PER_BATCH 8 evenly: "
            "set it to the number of GPUs that the batch is meant for; 0 scales nothing",
        ),
        (
            ["SOLVER.RESCALE_INTERVAL", True, "SOLVER.WARMUP_ITERS", 2],
            "SOLVER.WARMUP_ITERS: 2 is not below SOLVER.MAX_ITER 2: SOLVER.RESCALE_INTERVAL True "
            "needs iterations after it: shorten the warm-up",
        ),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.NUM_DECAYS", 0],
            "SOLVER.NUM_DECAYS: must be a whole number from 1 on, got 0",
        ),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (8, 4)],
            "INPUT.MIN_SIZE_TRAIN: must be the least and the greatest size",
        ),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5]], "INPUT.CROP.SIZE: must be 2 num"),
        (
            ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [2.0, 2.0]],
            "INPUT.CROP.SIZE: must be shares of the image up to 1",
        ),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "x"], "INPUT.CROP.TYPE: must be one of"),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1.0],
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE: must be a number above 0, got -1.0",
        ),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x"],
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE: must be one of value, norm",
        ),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"],
            "DATALOADER.RANDOM_SUBSET_RATIO: is not in the config, but DATALOADER.SAMPLER_TRAIN",
        ),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
            + ["DATALOADER.REPEAT_THRESHOLD", -1.0],
            "DATALOADER.REPEAT_THRESHOLD: must be a number above 0",
        ),
        (
            ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 0],
            "TEST.PRECISE_BN.NUM_ITER: must be a whole number from 1 on, got 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_keys_that_contradict_each_other_raise(tiny_cfg, overrides, line):
    """An evaluation reads only what is of the model."""
    tiny_cfg.merge_from_list(overrides)
    found = errors(tiny_cfg)
    assert len(found) == 1 and line in found[0], found


def test_infinite_norm_type_passes(tiny_cfg):
    """The maximum norm."""
    clip = tiny_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.NORM_TYPE = True, "norm", math.inf
    assert errors(tiny_cfg) == []


@pytest.mark.parametrize("key", ["SOLVER.STEPS", "SOLVER.WARMUP_ITERS"])
def test_schedule_beyond_the_end_gives_a_warning(tiny_cfg, log, key):
    """A shorter MAX_ITER on the command line is common, and Detectron2 allows it."""
    set_key(tiny_cfg, key, (1, 50) if key == "SOLVER.STEPS" else 50)
    check_config(tiny_cfg)
    (line,) = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert line.startswith(f"{key}: 50 ") and "SOLVER.MAX_ITER 2" in line


def test_evaluation_reads_no_key_of_the_training(tiny_cfg):
    """A config whose training cannot run here can still be evaluated."""
    tiny_cfg.SOLVER.MAX_ITER = tiny_cfg.SOLVER.IMS_PER_BATCH = 0
    tiny_cfg.MODEL.RETINANET.IOU_THRESHOLDS = []
    assert errors(tiny_cfg, eval_only=True) == []
    tiny_cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 0
    assert len(errors(tiny_cfg, eval_only=True)) == 1


def test_keys_of_the_rules_exist(tiny_cfg):
    """A rule for a key that no longer exists would check nothing. Detectron2 lacks one itself."""
    from retina_plugin.doctor import values

    keys = {*values._ALWAYS, *values._TRAINING, *(k for w in values._WHERE.values() for k in w)}
    assert keys - flatten(tiny_cfg).keys() == {"DATALOADER.RANDOM_SUBSET_RATIO"}


def test_several_errors_are_counted(tiny_cfg):
    """The line is the first one, and says how many follow."""
    tiny_cfg.SOLVER.MAX_ITER = tiny_cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ConfigError, match=r"\(and 1 more: `retina doctor` lists them\)"):
        check_config(tiny_cfg)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("TEST.AUG.FLIP", (None, "horizontal", 1)),
        ("TEST.AUG.MAX_SIZE", COUNTS),
        ("TEST.AUG.MIN_SIZES", ((), None, 800, (0,), (400, -1), (400.5,), ("a",), (NAN,))),
    ],
)
def test_keys_of_the_views_matter_where_views_are_asked_for(tiny_cfg, key, values):
    """In an evaluation too."""
    for value in values:
        set_key(tiny_cfg, key, value)
        tiny_cfg.TEST.AUG.ENABLED = False
        assert errors(tiny_cfg) == []
        tiny_cfg.TEST.AUG.ENABLED = True
        (line,) = errors(tiny_cfg, eval_only=True)
        assert line.startswith(f"{key}: must be ") and repr(value) in line


def test_mirrored_views_of_a_model_that_saw_no_mirrored_images_are_a_warning(tiny_cfg):
    tiny_cfg.TEST.AUG.ENABLED = True
    for flip, in_training, warns in (
        (True, "none", True),
        (True, "horizontal", False),
        (False, "none", False),
    ):
        tiny_cfg.TEST.AUG.FLIP, tiny_cfg.INPUT.RANDOM_FLIP = flip, in_training
        found = [f.severity for f in quick_checks(tiny_cfg) if f.where == "TEST.AUG.FLIP"]
        assert found == (["warning"] if warns else [])
