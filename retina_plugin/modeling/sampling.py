"""Which anchors the classification loss sees, chosen by ``MODEL.RETINANET.SAMPLER``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from retina_plugin.losses.dense import DenseTargets
from retina_plugin.registry import ComponentRegistry

__all__ = ["ANCHOR_SAMPLER_REGISTRY", "AllAnchors"]

# Entries are called with (targets, logits) and return the targets of the anchors they pick: an
# anchor that is left out moves to the ignored ones.
ANCHOR_SAMPLER_REGISTRY = ComponentRegistry("MODEL.RETINANET.SAMPLER")


@ANCHOR_SAMPLER_REGISTRY.register()
class AllAnchors:
    """Every anchor that is not ignored: "the focal loss is applied to all ~100k anchors in each
    sampled image" (section 4.1, "Focal Loss")."""

    def __call__(self, targets: DenseTargets, logits: Sequence[Tensor]) -> DenseTargets:
        """Return ``targets`` as they are. ``logits``: per level (N, A*K, Hi, Wi)."""
        return targets

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {}
