"""The config keys: what the plugin adds to Detectron2's, and what each means.

This is the only place that states a key's default, meaning, choices and section of the paper.
``docs/configuration.md`` is generated from it (``make docs``), and ``retina diff`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode  # the base of Detectron2's CfgNode

from retina_plugin.errors import ConfigError, did_you_mean

__all__ = [
    "DETECTRON2_KEYS",
    "KEYS",
    "REMOVED_KEYS",
    "Key",
    "add_retina_config",
    "flatten",
    "get_config_file",
    "section_of",
]


@dataclass(frozen=True)
class Key:
    """A config key.

    Args:
        meaning: what it does, in plain text; units in brackets.
        default: its default, for a key that the plugin adds.
        choices: every value that it accepts, if these are a fixed list of names.
        section: of the paper that describes it, e.g. "3.2, Table 1b"; "" if none does.
    """

    meaning: str
    default: Any = None
    choices: tuple[str, ...] = ()
    section: str = ""


# The keys that the plugin adds. The defaults of MODEL.RETINANET are Detectron2's behaviour, so that
# changing only META_ARCHITECTURE keeps a user's results (BOXES_OUTSIDE_TEST may add detections at
# the end). configs/ sets the paper's protocol.
KEYS: dict[str, Key] = {
    "IMPORTS": Key(
        "Your Python files (`my_loss.py`, seen from the working directory) or modules "
        "(`my.package`). They are imported before anything is built, and register your losses, "
        "heads, datasets or evaluators.",
        (),
    ),
    "MODEL.RETINANET.HEAD": Key(
        "The two subnets on the pyramid: a name in `RETINANET_HEAD_REGISTRY`.",
        "RetinaHead",
        section="4",
    ),
    "MODEL.RETINANET.CLS_LOSS": Key(
        "Classification loss: a name in `CLS_LOSS_REGISTRY`. `FocalLoss` (section 3.2), "
        "`CrossEntropy` (3.1), `FocalLossStar` (Appendix A), `HingeLoss` (5.1), or your own.",
        "FocalLoss",
        section="3, 5.1, Appendix A",
    ),
    "MODEL.RETINANET.ALPHA_PER_CLASS": Key(
        "One alpha for each of `NUM_CLASSES` classes instead of `FOCAL_LOSS_ALPHA`; `()` for none.",
        (),
    ),
    "MODEL.RETINANET.FOCAL_STAR_GAMMA": Key(
        "Steepness gamma of `FocalLossStar` (Eq. 7).", 2.0, section="Appendix A, Table 3"
    ),
    "MODEL.RETINANET.FOCAL_STAR_BETA": Key(
        "Shift beta of `FocalLossStar` (Eq. 7).", 1.0, section="Appendix A, Table 3"
    ),
    "MODEL.RETINANET.HINGE_MARGIN": Key(
        "The p_t above which `HingeLoss` is 0. The paper does not give its value.",
        0.9,
        section="5.1 Hinge Loss",
    ),
    "MODEL.RETINANET.SAMPLER": Key(
        "Which anchors the classification loss sees: a name in `ANCHOR_SAMPLER_REGISTRY`. "
        "`AllAnchors` (section 4.1) takes all that are not ignored. `OHEM` (5.1) takes the hardest "
        "anchors of each image after NMS of their predicted boxes. The box loss stays on all "
        "positive anchors.",
        "AllAnchors",
        section="4.1 Focal Loss, 5.1 OHEM",
    ),
    "MODEL.RETINANET.OHEM.BATCH_SIZE": Key(
        "Anchors of an image that `OHEM` keeps. The classification loss is divided by the number "
        "that it kept, image by image.",
        128,
        section="5.1 OHEM, Table 1d",
    ),
    "MODEL.RETINANET.OHEM.NMS_THRESH": Key(
        "IoU above which `OHEM` drops the anchor with the lower loss.",
        0.5,
        section="5.1 OHEM, Table 1d",
    ),
    "MODEL.RETINANET.OHEM.POSITIVE_FRACTION": Key(
        "Largest share of positive anchors that `OHEM` keeps: None for any share, .25 for the "
        "paper's OHEM 1:3.",
        None,
        section="5.1 OHEM, Table 1d",
    ),
    "MODEL.RETINANET.LOSS_BACKEND": Key(
        "What computes the classification loss over all anchors. `eager` is plain PyTorch. "
        "`native` is C++ for CPUs, compiled at first use. `triton` is for CUDA GPUs; it has never "
        "run on one. `auto` takes the fastest that is available: each kernel is compared with "
        "`eager` at first use and is not used if its numbers differ. If you name a backend that is "
        "not available, training stops with an error.",
        "auto",
        ("auto", "eager", "native", "triton"),
    ),
    "MODEL.RETINANET.LOSS_IN_PLACE": Key(
        "Write the gradient of the classification loss over the logits. Saves memory of the size "
        "of the logits. Excludes `VIS_PERIOD`, `OHEM` and training in float16.",
        False,
    ),
    "MODEL.RETINANET.IGNORE_IOF_THRESH": Key(
        "Crowd boxes: a background anchor is ignored if at least this share of its area lies in "
        "one crowd box. None: crowd boxes are background, as in Detectron2.",
        None,
    ),
    "MODEL.RETINANET.NORMALIZER": Key(
        "What both losses are divided by: the number of positive anchors, counted `per_image` "
        "(the paper), `per_gpu` (Detectron), over all GPUs (`global`), or as a moving average "
        "(`ema`, Detectron2; here it is averaged over GPUs and saved in checkpoints).",
        "ema",
        ("per_image", "per_gpu", "global", "ema"),
        "4.1 Focal Loss",
    ),
    "MODEL.RETINANET.LOW_QUALITY_MATCHES": Key(
        "Whether the best anchor of a ground-truth box is positive although its IoU is low: "
        "`always` (Detectron2), only if its best IoU is `above_background` (Detectron), `never`. "
        "The paper does not say.",
        "always",
        ("always", "above_background", "never"),
        "4 Anchors",
    ),
    "MODEL.RETINANET.P6_SOURCE": Key(
        "What P6 is computed from: C5 (`res5`, the paper) or P5 (`p5`, torchvision's first "
        "RetinaNet). Read by `MODEL.BACKBONE.NAME: build_retina_fpn_backbone` and "
        "`build_timm_retina_fpn_backbone`.",
        "res5",
        ("res5", "p5"),
        "4, footnote 2",
    ),
    "MODEL.TIMM.NAME": Key(
        "The model of timm that `MODEL.BACKBONE.NAME: build_timm_retina_fpn_backbone` builds the "
        "pyramid on, e.g. `resnet18` or `convnext_atto`: one with features of the strides 8, 16 "
        "and 32. `MODEL.WEIGHTS: timm://NAME` loads its ImageNet weights.",
        "",
    ),
    "MODEL.TIMM.NORM": Key(
        "What becomes of the batch norms of `MODEL.TIMM.NAME`: `FrozenBN` keeps them as they are "
        "in `MODEL.WEIGHTS`, `BN` trains them, `SyncBN` also computes their statistics over all "
        "GPUs. Other norms are trained.",
        "FrozenBN",
        ("FrozenBN", "BN", "SyncBN"),
    ),
    "MODEL.RETINANET.RELU_BEFORE_P7": Key(
        "Whether P7 is computed from ReLU(P6) (the paper), or from P6 (False, MMDetection). Read "
        "by `MODEL.BACKBONE.NAME: build_retina_fpn_backbone` and "
        "`build_timm_retina_fpn_backbone`.",
        True,
        section="4, footnote 2",
    ),
    "MODEL.RETINANET.BOXES_OUTSIDE_TEST": Key(
        "Boxes outside the image, most of them in the padding of an image in a batch. `drop`: they "
        "take no place of another detection, so that an image has the same candidates in every "
        "batch. `keep`: they do, and are removed afterwards (Detectron2; the detections are the "
        "first ones of `drop`). `clip`: they are moved to the border before NMS and stay, without "
        "area (torchvision).",
        "drop",
        ("drop", "keep", "clip"),
    ),
    "MODEL.CHANNELS_LAST": Key(
        "Images, weights and features in NHWC memory: faster convolutions, above all in 16 bit.",
        False,
    ),
    "MODEL.COMPILE": Key(
        "`torch.compile` of backbone and head. With `MODEL.ACTIVATION_CHECKPOINTING`, batch norm "
        "must be frozen, or replaced by GN.",
        False,
    ),
    "MODEL.ACTIVATION_CHECKPOINTING": Key(
        "Compute activations of backbone and head again in the backward pass instead of keeping "
        "them: less memory, about a quarter more time.",
        False,
    ),
    "INPUT.RESIZE": Key(
        "How an image is resized to `INPUT.MIN_SIZE_TRAIN` or `_TEST`. `detectron2`: the sides are "
        "rounded, the bilinear filter is widened where the image shrinks (antialiasing), pixels "
        "are rounded to whole numbers. `torchvision`: the sides are rounded down, no antialiasing, "
        "pixels are not rounded. Weights detect best with the one they were trained with.",
        "detectron2",
        ("detectron2", "torchvision"),
    ),
    "INPUT.MAPPER": Key(
        "What reads and augments images: a name in `DATASET_MAPPER_REGISTRY`. `FastMapper` gives "
        "the records of `DatasetMapper` (Detectron2's) in a third of the time, with the same "
        "random draws and boxes.",
        "FastMapper",
    ),
    "DATALOADER.ON_BAD_IMAGE": Key(
        "What a training does with an image that is missing, damaged, of more than 8 bits, or of "
        "another size than its record: `error` stops with its name, `skip` warns once and takes "
        "another image. In an evaluation it is always an error.",
        "error",
        ("error", "skip"),
    ),
    "SOLVER.AMP.PRECISION": Key(
        "Precision of training, where `SOLVER.AMP.ENABLED`: `float16` with loss scaling (GPU), or "
        "`bfloat16` (also on the CPU).",
        "float16",
        ("float16", "bfloat16"),
    ),
    "SOLVER.ACCUMULATE": Key(
        "Passes that a batch is split into. `SOLVER.IMS_PER_BATCH` is the whole batch; the "
        "gradients of its passes are added up for one step.",
        1,
    ),
    "SOLVER.MAX_SKIPPED_STEPS": Key(
        "Steps with a loss or gradient that is not finite, which a training may skip; at the next "
        "one it stops with an error. 0: it stops at the first. A skipped step leaves the weights "
        "as they were, and a warning names its images.",
        0,
    ),
    "SOLVER.PROCESS_TIMEOUT": Key(
        "Several processes: when one has not been heard of, or has not got on with an iteration, "
        "for that long (seconds), all others end, and the error names it. An evaluation or a "
        "checkpoint may take longer.",
        600,
    ),
    "TRACKING": Key(
        "Clients that get a training's scalars, results, pictures and config: `wandb` (Weights & "
        "Biases), `mlflow`. `pip install` them yourself; their environment variables say where it "
        "goes, e.g. `WANDB_PROJECT`, `WANDB_MODE`, `MLFLOW_TRACKING_URI`, "
        "`MLFLOW_EXPERIMENT_NAME`. A resumed training goes on in the same run.",
        (),
    ),
    "TEST.AUG.MERGE": Key(
        "With `TEST.AUG.ENABLED`: how the detections of the views become those of the image. `wbf` "
        "averages boxes of a class with an IoU above .55 (weighted boxes fusion, "
        "arXiv:1910.13302); the others, see `TEST.MERGE`, pool the boxes.",
        "wbf",
        ("nms", "soft_nms", "class_agnostic", "wbf"),
    ),
    "TEST.MERGE": Key(
        "What becomes of boxes that overlap more than `MODEL.RETINANET.NMS_THRESH_TEST`. `nms`: "
        "the best of each class stays. `soft_nms`: the others of the class get lower scores "
        "(Gaussian, sigma .5, arXiv:1704.04503; it has no threshold). `class_agnostic`: the best "
        "of all classes stays. `wbf`: those of a class are averaged (see `TEST.AUG.MERGE`).",
        "nms",
        ("nms", "soft_nms", "class_agnostic", "wbf"),
        "4.1 Inference",
    ),
    "TEST.PRECISION": Key(
        "Precision of inference. Decoding and NMS are always float32.",
        "float32",
        ("float32", "bfloat16", "float16"),
    ),
    "TEST.EVALUATORS": Key(
        "What is computed of the detections in `DATASETS.TEST`, in one pass over the images: names "
        "in `EVALUATOR_REGISTRY`. `FastCOCOEvaluator` and `COCOEvaluator` (Detectron2's) give the "
        "same AP; only the latter also writes `instances_predictions.pth`. `ReportEvaluator` "
        "writes the page of `retina report` and what each type of error costs. Your own is "
        "registered by a file of `IMPORTS`.",
        ("FastCOCOEvaluator",),
    ),
}

# Detectron2's keys that the paper describes. Name and meaning are Detectron2's.
DETECTRON2_KEYS: dict[str, Key] = {
    "DATASETS.TEST": Key("Datasets to evaluate on.", section="5"),
    "DATASETS.TRAIN": Key("Datasets to train on.", section="5"),
    "INPUT.MIN_SIZE_TEST": Key(
        "Shorter side of an image in inference (pixels).", section="5.1, Table 1e"
    ),
    "INPUT.MIN_SIZE_TRAIN": Key(
        "Shorter side of an image in training (pixels); one of several is drawn at random.",
        section="5.1, Table 1e, Table 2",
    ),
    "INPUT.RANDOM_FLIP": Key("Random flip in training.", section="4.1 Optimization"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Key(
        "Height over width of the anchors of a location.", section="4 Anchors, 5.2, Table 1c"
    ),
    "MODEL.ANCHOR_GENERATOR.NAME": Key(
        "`DefaultAnchorGenerator` (Detectron2's), `TorchvisionAnchorGenerator` (torchvision's: "
        "whole pixels, and another distance of the locations where a level's size is rounded up), "
        "or `DetectronAnchorGenerator` (Detectron's: rounded sides).",
        section="4 Anchors",
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": Key(
        "Square roots of the anchors' areas on each level (pixels).",
        section="4 Anchors, 5.2, Table 1c",
    ),
    "MODEL.FPN.IN_FEATURES": Key(
        "Backbone features that the pyramid is built from.", section="4, footnote 2"
    ),
    "MODEL.FPN.OUT_CHANNELS": Key("Channels of every pyramid level.", section="4"),
    "MODEL.RESNETS.DEPTH": Key("Layers of the ResNet.", section="5.1, Table 1e"),
    "MODEL.RESNETS.NUM_GROUPS": Key("Groups of a ResNeXt's 3x3 convs.", section="5.3, Table 2"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Key("Channels of each group.", section="5.3, Table 2"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": Key(
        "Box loss: `smooth_l1` (the paper), `l1`, `giou`, `diou`, `ciou`, or a name in "
        "`BOX_LOSS_REGISTRY`.",
        section="4.1 Optimization",
    ),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": Key(
        "Weight alpha of label 1; label 0 has 1 - alpha. Every classification loss reads it. None "
        "or a negative number: both weigh 1.",
        section="3.1, 5.1, Table 1a",
    ),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": Key(
        "Focusing parameter gamma of `FocalLoss`.", section="3.2, 5.1, Table 1b"
    ),
    "MODEL.RETINANET.IN_FEATURES": Key("Pyramid levels that the head sees.", section="4"),
    "MODEL.RETINANET.IOU_LABELS": Key(
        "Label of an anchor in each interval of IoU: 0 background, -1 ignored, 1 positive.",
        section="4 Anchors",
    ),
    "MODEL.RETINANET.IOU_THRESHOLDS": Key(
        "IoUs that separate the intervals of `IOU_LABELS`.", section="4 Anchors"
    ),
    "MODEL.RETINANET.NMS_THRESH_TEST": Key(
        "IoU above which NMS drops the lower-scored box of a class.", section="4.1 Inference"
    ),
    "MODEL.RETINANET.NUM_CONVS": Key("3x3 convs of a subnet before its last one.", section="4"),
    "MODEL.RETINANET.PRIOR_PROB": Key(
        "Probability pi that an untrained model gives every class; it sets the bias of the last "
        "classification conv.",
        section="3.3, 4.1, 5.1",
    ),
    "MODEL.RETINANET.SCORE_THRESH_TEST": Key(
        "Detections need a score above it.", section="4.1 Inference"
    ),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": Key(
        "|d| below which the box loss `smooth_l1` is a parabola; 0 is L1.",
        section="4.1 Optimization",
    ),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": Key(
        "Predictions of a level that are decoded.", section="4.1 Inference"
    ),
    "MODEL.WEIGHTS": Key(
        "Weights that training starts from: a file or a URL.", section="4.1 Initialization"
    ),
    "SOLVER.BASE_LR": Key("Learning rate after the warm-up.", section="4.1 Optimization"),
    "SOLVER.GAMMA": Key(
        "What the learning rate is multiplied by at each of `SOLVER.STEPS`.",
        section="4.1 Optimization",
    ),
    "SOLVER.IMS_PER_BATCH": Key("Images of a batch, over all GPUs.", section="4.1 Optimization"),
    "SOLVER.MAX_ITER": Key("Iterations.", section="4.1 Optimization, Table 2"),
    "SOLVER.MOMENTUM": Key("Momentum of SGD.", section="4.1 Optimization"),
    "SOLVER.STEPS": Key(
        "Iterations at which the learning rate drops.", section="4.1 Optimization, Table 2"
    ),
    "SOLVER.WEIGHT_DECAY": Key("Weight decay of SGD.", section="4.1 Optimization"),
}

# Keys of earlier versions -> what to do instead.
REMOVED_KEYS: dict[str, str] = {
    "INPUT.PAD_DIVISOR": (
        "delete it; images are padded to the backbone's stride, MODEL.COMPILE handles any size"
    ),
    "SOLVER.DDP.COMPRESSION": "delete it; register a communication hook on the trainer's model",
    "SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW": "delete it; it was never measured to help",
    "SOLVER.DDP.STATIC_GRAPH": "delete it; it was never measured to help",
    "TEST.EVALUATOR": "write TEST.EVALUATORS, a list of names: ('FastCOCOEvaluator',)",
    "SOLVER.LR_PER_IMAGE": (
        "delete it; set SOLVER.BASE_LR and SOLVER.IMS_PER_BATCH together, or "
        "SOLVER.REFERENCE_WORLD_SIZE to scale both with the number of GPUs"
    ),
}


def section_of(key: str) -> str:
    """The section of the paper that describes a key, e.g. "3.2, Table 1b"; "" if none does."""
    known = KEYS.get(key) or DETECTRON2_KEYS.get(key)
    return known.section if known else ""


def add_retina_config(cfg: CfgNode) -> CfgNode:
    """Add the plugin's keys to ``cfg`` where they are missing, and return ``cfg``.

    Values that are set already stay, so it may be called again at any time. Nothing but ``cfg``
    is changed.

        cfg = add_retina_config(detectron2.config.get_cfg())
    """
    frozen = cfg.is_frozen()
    cfg.defrost()
    for name, key in KEYS.items():
        *path, leaf = name.split(".")
        node = cfg
        for part in path:
            node = node.setdefault(part, type(cfg)())
        node.setdefault(leaf, key.default)
    if frozen:
        cfg.freeze()
    return cfg


def flatten(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Full key ("MODEL.RETINANET.HEAD") -> value, of a config or of nested dicts."""
    flat: dict[str, Any] = {}
    for name, value in cfg.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return flat


def get_config_file(name: str) -> str:
    """Path of one of the paper's configs, as ``detectron2.model_zoo.get_config_file`` gives it.

    Args:
        name: a file of ``configs/``, e.g. "retina_R101_800.yaml" or "table1b_gamma/fl_gamma2.yaml".

    Raises:
        ConfigError: there is no such config; the message names the nearest ones.
    """
    installed, checkout = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"
    folder = installed if installed.is_dir() else checkout
    path = folder / name
    if not path.is_file():
        known = [str(p.relative_to(folder).as_posix()) for p in folder.rglob("*.yaml")]
        raise ConfigError(f"no config is named {name}{did_you_mean(name, known)}")
    return str(path)
