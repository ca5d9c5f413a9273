"""Statistics of batch norm over many batches (``TEST.PRECISE_BN``)."""

from __future__ import annotations

from detectron2.engine import hooks
from fvcore.nn.precise_bn import BN_MODULE_TYPES

from .buffers import kept_buffers

__all__ = ["PreciseBN"]


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, which changes the statistics of batch norm and nothing else of the model.

    It runs the model in training mode, which also moves other buffers. One is the average of
    ``NORMALIZER ema``, which counts the positives of a pass (``SOLVER.ACCUMULATE``), while the hook
    gives the model whole batches.
    """

    def update_stats(self) -> None:
        if self._disabled:
            return
        with kept_buffers(self._model, *BN_MODULE_TYPES):
            super().update_stats()
