"""Every config key that the plugin adds to Detectron2's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

__all__ = ["add_retina_config", "flatten"]

# key -> default. Defaults of MODEL.RETINANET are Detectron2's behaviour, so that changing only
# META_ARCHITECTURE keeps a user's results; the paper's protocol is what configs/ sets.
_DEFAULTS: dict[str, Any] = {
    # Your Python files ("my_loss.py", seen from the working directory) or modules ("my.package"),
    # imported before anything is built: they register your losses, heads, datasets, evaluators.
    "IMPORTS": (),
    # Subnets on the pyramid (section 4), a name in RETINANET_HEAD_REGISTRY.
    "MODEL.RETINANET.HEAD": "RetinaHead",
    # Classification loss, a name in CLS_LOSS_REGISTRY: FocalLoss (section 3.2), CrossEntropy (3.1),
    # FocalLossStar (Appendix A), HingeLoss (5.1). FOCAL_LOSS_ALPHA is the alpha of each of them
    # (None: no balancing), FOCAL_LOSS_GAMMA that of FocalLoss alone.
    "MODEL.RETINANET.CLS_LOSS": "FocalLoss",
    # One alpha for each of NUM_CLASSES classes instead of FOCAL_LOSS_ALPHA; () for none.
    "MODEL.RETINANET.ALPHA_PER_CLASS": (),
    # FL* (Appendix A, Eq. 7): steepness and shift; Table 3 has (2, 1) and (4, 0), alpha .25.
    "MODEL.RETINANET.FOCAL_STAR_GAMMA": 2.0,
    "MODEL.RETINANET.FOCAL_STAR_BETA": 1.0,
    # Hinge on p_t (section 5.1): the p_t above which the loss is 0; the paper does not give it.
    "MODEL.RETINANET.HINGE_MARGIN": 0.9,
    # Anchors that the classification loss sees, a name in ANCHOR_SAMPLER_REGISTRY: AllAnchors
    # (section 4.1), OHEM (5.1).
    "MODEL.RETINANET.SAMPLER": "AllAnchors",
    # OHEM (section 5.1, Table 1d): anchors of an image that stay, NMS threshold of their predicted
    # boxes, and the largest share of positives: None for OHEM, .25 for OHEM 1:3. With OHEM the
    # classification loss is divided by the number of anchors that stay, image by image. Choices:
    # the box loss stays on all positives, divided as NORMALIZER says.
    "MODEL.RETINANET.OHEM.BATCH_SIZE": 128,
    "MODEL.RETINANET.OHEM.NMS_THRESH": 0.5,
    "MODEL.RETINANET.OHEM.POSITIVE_FRACTION": None,
    # What sums the classification loss over all anchors: auto (triton on CUDA, native on a CPU with
    # a C++ compiler, else eager), or one of eager, native, triton.
    "MODEL.RETINANET.LOSS_BACKEND": "auto",
    # Let the loss write its gradient over the logits: saves 1x the logits of memory. Pictures of
    # training (VIS_PERIOD) need the logits and exclude it; with OHEM it has no effect.
    "MODEL.RETINANET.LOSS_IN_PLACE": False,
    # Crowd boxes: a background anchor of which at least this share lies in one is ignored (IoF,
    # intersection over the anchor's area). None: crowds are background, as in Detectron2.
    "MODEL.RETINANET.IGNORE_IOF_THRESH": None,
    # What both losses are divided by (section 4.1): per_image (the paper), per_gpu (Detectron),
    # global (all-reduced), ema (Detectron2, but all-reduced and checkpointed).
    "MODEL.RETINANET.NORMALIZER": "ema",
    # Whether the best anchor of a box is positive at any IoU (section 4, "Anchors"; the paper does
    # not say): always (Detectron2), above_background (Detectron), never.
    "MODEL.RETINANET.LOW_QUALITY_MATCHES": "always",
    # P6 from C5 (res5: the paper, footnote 2) or from P5 (p5: torchvision V1). Read by the backbone
    # build_retina_fpn_backbone.
    "MODEL.RETINANET.P6_SOURCE": "res5",
    # Speed and memory. Weights, checkpoints and results stay the same but for rounding.
    # channels_last memory of images, weights and features: faster convolutions, above all 16 bit.
    "MODEL.CHANNELS_LAST": False,
    # torch.compile of backbone and head. With ACTIVATION_CHECKPOINTING norms must be frozen, or GN.
    "MODEL.COMPILE": False,
    # Recompute the backbone's and the head's activations in the backward pass instead of keeping
    # them: less memory, about a quarter more time.
    "MODEL.ACTIVATION_CHECKPOINTING": False,
    # Pad images to a multiple of it instead of the backbone's 32, so that there are few shapes for
    # torch.compile, cuDNN and CUDA graphs; 0: the backbone's.
    "INPUT.PAD_DIVISOR": 0,
    # float16 (with loss scaling, Detectron2's) or bfloat16 (needs none; the CPU has it too), where
    # SOLVER.AMP.ENABLED.
    "SOLVER.AMP.PRECISION": "float16",
    # Batches whose gradients are added up for one step: IMS_PER_BATCH is the whole, each pass
    # takes IMS_PER_BATCH / ACCUMULATE images.
    "SOLVER.ACCUMULATE": 1,
    # DistributedDataParallel: a graph that never changes (not with ACCUMULATE), gradients that live
    # in the buckets, and what they are sent as (none, float16, bfloat16).
    "SOLVER.DDP.STATIC_GRAPH": False,
    "SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW": False,
    "SOLVER.DDP.COMPRESSION": "none",
    # What reads and augments training images, a name in DATASET_MAPPER_REGISTRY: FastMapper, or
    # DatasetMapper (Detectron2's).
    "INPUT.MAPPER": "FastMapper",
    # Precision of inference: float32, bfloat16, float16; NMS is always float32.
    "TEST.PRECISION": "float32",
    # What computes the metrics of DATASETS.TEST, a name in EVALUATOR_REGISTRY.
    # FastCOCOEvaluator, or COCOEvaluator (Detectron2's, pycocotools): the same numbers.
    "TEST.EVALUATOR": "FastCOCOEvaluator",
    # Learning rate per image of the batch by the linear scaling rule; .01 for 16 images in the
    # paper (section 4.1). A run whose BASE_LR / IMS_PER_BATCH is far from it is warned; 0.0: never.
    "SOLVER.LR_PER_IMAGE": 0.01 / 16,
}


def add_retina_config(cfg: CfgNode) -> CfgNode:
    """Add the plugin's keys to ``cfg`` where they are missing, and return ``cfg``.

    Values that are set already stay, so it may be called again at any time; it changes nothing
    but ``cfg``.
    """
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key, default in _DEFAULTS.items():
        *path, leaf = key.split(".")
        node = cfg
        for name in path:
            node = node.setdefault(name, CfgNode())
        node.setdefault(leaf, default)
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
