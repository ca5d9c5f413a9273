"""The detector and its parts; importing this registers them with Detectron2."""

from .anchors import DetectronAnchorGenerator, TorchvisionAnchorGenerator
from .backbone import build_retina_fpn_backbone
from .contracts import BoxCoder, Inference, Labeler, Matcher, Matches, Sample, Sampler
from .detector import FocalRetinaNet
from .head import RETINANET_HEAD_REGISTRY, RetinaHead, prior_bias
from .labeling import AnchorLabeler
from .matcher import AnchorMatcher
from .normalizer import LossNormalizer
from .sampling import ANCHOR_SAMPLER_REGISTRY, OHEM, AllAnchors
from .test_time_augmentation import RetinaNetWithTTA
from .timm_backbone import TimmFeatures, build_timm_retina_fpn_backbone

__all__ = [
    "ANCHOR_SAMPLER_REGISTRY",
    "OHEM",
    "RETINANET_HEAD_REGISTRY",
    "AllAnchors",
    "AnchorLabeler",
    "AnchorMatcher",
    "BoxCoder",
    "DetectronAnchorGenerator",
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
    "TimmFeatures",
    "TorchvisionAnchorGenerator",
    "build_retina_fpn_backbone",
    "build_timm_retina_fpn_backbone",
    "prior_bias",
]
