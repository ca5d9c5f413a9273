"""A trained detector as a file that runs elsewhere."""

from .dense import STAGES, DenseModel
from .export import export_model
from .formats import write_exported
from .metadata import Metadata, describe_model
from .runtime import SUFFIXES, ExportedModel, load_exported

__all__ = [
    "STAGES",
    "SUFFIXES",
    "DenseModel",
    "ExportedModel",
    "Metadata",
    "describe_model",
    "export_model",
    "load_exported",
    "write_exported",
]
