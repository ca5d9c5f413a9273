"""The embedded dataset, which importing this registers, and the dataset mappers."""

from . import digits, encoding
from .mapper import DATASET_MAPPER_REGISTRY, DatasetMapper, FastMapper

__all__ = ["DATASET_MAPPER_REGISTRY", "DatasetMapper", "FastMapper"]

digits.register()
encoding.extend_pycocotools()
