"""Datasets that the package brings (importing this registers them) and what reads their records."""

from . import digits
from .mapper import DATASET_MAPPER_REGISTRY, DatasetMapper, FastMapper

__all__ = ["DATASET_MAPPER_REGISTRY", "DatasetMapper", "FastMapper"]

digits.register()
