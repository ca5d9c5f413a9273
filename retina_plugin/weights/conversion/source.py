"""What a kind of weights has to tell to be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Converted", "Source"]


@dataclass(frozen=True)
class Converted:
    """Weights with this plugin's names, and the config that belongs to them.

    Args:
        state: name -> tensor.
        config: content of the config file, ``_BASE_`` included.
        class_names: of each class; None if the weights do not tell.
        notes: what a user should know, one sentence each.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A program that wrote weights.

    Args:
        name: for ``retina convert --from``.
        recognises: state dict -> whether its names are those of this program.
        convert: state dict -> :class:`Converted`; raises ConfigError for a model that this plugin
            does not have.
    """

    name: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Tensor]], Converted]
