"""The detector and its parts; importing this registers them with Detectron2."""

from .backbone import build_retina_fpn_backbone
from .contracts import BoxCoder, Inference, Labeler, Matcher, Matches, Sample, Sampler
from .detector import FocalRetinaNet
from .head import RETINANET_HEAD_REGISTRY, RetinaHead, prior_bias
from .labeling import AnchorLabeler
from .matcher import AnchorMatcher
from .normalizer import LossNormalizer
from .sampling import ANCHOR_SAMPLER_REGISTRY, OHEM, AllAnchors
from .test_time_augmentation import RetinaNetWithTTA

__all__ = [
    "ANCHOR_SAMPLER_REGISTRY",
    "OHEM",
    "RETINANET_HEAD_REGISTRY",
    "AllAnchors",
    "AnchorLabeler",
    "AnchorMatcher",
    "BoxCoder",
    "FocalRetinaNet",
    "Inference",
    "Labeler",
    "LossNormalizer",
    "Matcher",
    "Matches",
    "RetinaHead",
    "RetinaNetWithTTA",
    "Sample",
    "Sampler",
    "build_retina_fpn_backbone",
    "prior_bias",
]
