"""Every config key that the plugin adds to Detectron2's."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

__all__ = ["add_retina_config"]

# key -> default. Defaults of MODEL.RETINANET are Detectron2's behaviour, so that changing only
# META_ARCHITECTURE keeps a user's results; the paper's protocol is what configs/ sets.
_DEFAULTS: dict[str, Any] = {
    # Your Python files ("my_loss.py", seen from the working directory) or modules ("my.package"),
    # imported before anything is built: they register your losses, heads, datasets, evaluators.
    "IMPORTS": (),
    # Subnets on the pyramid (section 4), a name in RETINANET_HEAD_REGISTRY.
    "MODEL.RETINANET.HEAD": "RetinaHead",
    # Classification loss (sections 3.1, 3.2), a name in CLS_LOSS_REGISTRY: FocalLoss, CrossEntropy.
    # Each reads FOCAL_LOSS_ALPHA (None: no balancing), FocalLoss reads FOCAL_LOSS_GAMMA too.
    "MODEL.RETINANET.CLS_LOSS": "FocalLoss",
    # Anchors that the classification loss sees (section 4.1), a name in ANCHOR_SAMPLER_REGISTRY.
    "MODEL.RETINANET.SAMPLER": "AllAnchors",
    # What both losses are divided by (section 4.1): per_image (the paper), per_gpu (Detectron),
    # global (all-reduced), ema (Detectron2, but all-reduced and checkpointed).
    "MODEL.RETINANET.NORMALIZER": "ema",
    # Whether the best anchor of a box is positive at any IoU (section 4, "Anchors"; the paper does
    # not say): always (Detectron2), above_background (Detectron), never.
    "MODEL.RETINANET.LOW_QUALITY_MATCHES": "always",
    # P6 from C5 (res5: the paper, footnote 2) or from P5 (p5: torchvision V1). Read by the backbone
    # build_retina_fpn_backbone.
    "MODEL.RETINANET.P6_SOURCE": "res5",
    # What computes the metrics of DATASETS.TEST, a name in EVALUATOR_REGISTRY.
    "TEST.EVALUATOR": "COCOEvaluator",
    # Learning rate per image of the batch by the linear scaling rule; .01 for 16 images in the
    # paper (section 4.1). A run whose BASE_LR / IMS_PER_BATCH is far from it is warned; 0: never.
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
            node = node[name]
        node.setdefault(leaf, default)
    if frozen:
        cfg.freeze()
    return cfg
