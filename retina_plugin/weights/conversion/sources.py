"""Which library a file of weights is from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from retina_plugin.errors import ConfigError, check_choice

from . import detectron, detectron2, imagenet, mmdetection, torchvision
from .source import Source

__all__ = ["SOURCES", "find_source", "get_source", "without_prefix"]

# What programs put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")

SOURCES = {
    module.SOURCE.name: module.SOURCE
    for module in (torchvision, detectron, mmdetection, detectron2, imagenet)
}
"""Name, as ``--from`` takes it, -> source."""


def get_source(name: str) -> Source:
    """A source by its name.

    Raises:
        ConfigError: there is none; it lists the known ones.
    """
    check_choice("--from", name, SOURCES)
    return SOURCES[name]


def find_source(state: Mapping[str, Tensor]) -> Source | None:
    """The source that recognises these names; None if none does.

    Raises:
        ConfigError: several do.
    """
    found = [source for source in SOURCES.values() if source.recognises(state)]
    if len(found) > 1:
        names = ", ".join(source.name for source in found)
        raise ConfigError(f"its names are those of several libraries ({names}): choose with --from")
    return found[0] if found else None


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without what DistributedDataParallel and others put before every name."""
    plain = dict(state)
    for _ in range(3):  # prefixes before prefixes
        for prefix in _PREFIXES:
            if plain and all(name.startswith(prefix) for name in plain):
                plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain
