"""The embedded dataset, which importing this registers, others by name, and the mappers."""

from . import digits, encoding
from .formats import register_datasets
from .mapper import DATASET_MAPPER_REGISTRY, DatasetMapper, FastMapper

__all__ = ["DATASET_MAPPER_REGISTRY", "DatasetMapper", "FastMapper", "register_datasets"]

digits.register()
encoding.extend_pycocotools()
