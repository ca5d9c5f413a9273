"""Reading and writing weights and checkpoints, without running code from a file."""

from .checkpointer import Checkpointer
from .reading import read_checkpoint
from .timm_weights import TimmHandler  # registers timm://

__all__ = ["Checkpointer", "TimmHandler", "read_checkpoint"]
