"""What a module that converts one library's weights consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Converted", "Source"]


@dataclass(frozen=True)
class Converted:
    """Weights in the names and shapes of our models, and the config that belongs to them."""

    state: dict[str, Tensor]
    """Of the model that ``config`` builds: name -> tensor."""
    config: dict[str, Any]
    """Content of its YAML file: nested dicts, with ``_BASE_`` where it has one."""
    class_names: list[str] | None = None
    """In the order of the classes; None if the file does not tell."""
    notes: list[str] = field(default_factory=list)
    """For the user, one sentence each: what the weights are, what cannot be equal."""


@dataclass(frozen=True)
class Source:
    """A library whose weights can be converted."""

    name: str
    """As ``--from`` takes it, e.g. "torchvision"."""
    recognises: Callable[[Mapping[str, Tensor]], bool]
    """Whether these names and shapes are those of the library."""
    convert: Callable[[Mapping[str, Tensor]], Converted]
    """Raises ``ConfigError`` if something is missing or unknown: one line."""
