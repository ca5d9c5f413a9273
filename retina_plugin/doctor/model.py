"""Whether the model of a config can be built, in a moment and without its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from retina_plugin.errors import ConfigError, did_you_mean

from .findings import Finding, Severity

__all__ = ["build_without_memory", "check_model"]

T = TypeVar("T")


def build_without_memory(build: Callable[[], T]) -> T:
    """What ``build`` returns, on PyTorch's meta device if that is possible.

    It is not for a module whose constructor reads the numbers of a tensor. Then it is built as it
    is, and what that raises is raised.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return build()


def check_model(cfg: CfgNode) -> Iterator[Finding]:
    """Every component that a config names exists, and they fit together."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        known = [known for known, _ in META_ARCH_REGISTRY]
        yield Finding(
            Severity.ERROR,
            "MODEL.META_ARCHITECTURE",
            f"no detector '{name}' is registered{did_you_mean(name, known)}",
            "set FocalRetinaNet, or register yours in a file of IMPORTS",
        )
        return
    try:
        build_without_memory(lambda: META_ARCH_REGISTRY.get(name)(cfg))
    except ConfigError as error:
        key, _, what = str(error).partition(": ")
        if not key.startswith("MODEL.") or " " in key:
            key, what = "MODEL", str(error)
        yield Finding(Severity.ERROR, key, what)
    except Exception as error:  # of Detectron2 or of a component of the user's
        text = " ".join(str(error).split())
        yield Finding(
            Severity.ERROR, "MODEL", f"the model cannot be built: {type(error).__name__}: {text}"
        )
