"""Reading and writing weights and checkpoints, without running code from a file."""

from .checkpointer import Checkpointer
from .reading import read_checkpoint

__all__ = ["Checkpointer", "read_checkpoint"]
