"""The cumulative distribution of the focal loss over samples that arrive in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retina_plugin.errors import ConfigError
from retina_plugin.losses import FocalLoss

__all__ = ["Curve", "LossDistribution"]

# Bins of x_t. FL with gamma changes by a factor of at most exp((1 + gamma) / 4096) in a bin: for
# gamma 2 that makes an error below 4e-4, see LossDistribution.curve.
_LIMIT, _PER_UNIT = 128, 4096


@dataclass(frozen=True)
class Curve:
    """A cumulative distribution: the easiest ``fraction`` of the samples has ``share`` of the loss.

    Args:
        fraction, share: rising from 0 to 1.
        error: the largest possible difference of ``share`` from that of the sorted samples.
    """

    fraction: np.ndarray
    share: np.ndarray
    error: float

    def at(self, fraction: Any) -> np.ndarray:
        """The share of the loss that this fraction of the samples, the easiest, holds."""
        return np.interp(fraction, self.fraction, self.share)

    def hardest(self, fraction: float) -> float:
        """The share of the loss that this fraction of the samples, the hardest, holds."""
        return 1 - float(self.at(1 - fraction))


class LossDistribution:
    """How the focal loss is distributed over samples that arrive in pieces.

    FL falls with x_t for every gamma, so the order of the samples is the order of x_t: a histogram
    of x_t is enough for all gammas. It takes 8 MB, whatever the number of samples.

        distribution = LossDistribution()
        distribution.add(x_t)  # again and again
        distribution.curve(gamma=2.0).hardest(0.01)
    """

    def __init__(self) -> None:
        self._count = torch.zeros(2 * _LIMIT * _PER_UNIT, dtype=torch.int64)

    def __len__(self) -> int:
        return int(self._count.sum())

    def add(self, x_t: Tensor) -> None:
        """Count samples: logits times labels, any shape.

        Raises:
            ConfigError: one is not finite, or not in (-128, 128).
        """
        if x_t.numel() == 0:
            return
        low, high = (float(x) for x in x_t.aminmax())
        if not -_LIMIT < low <= high < _LIMIT:  # also for NaN
            raise ConfigError(
                f"the logits of this model reach from {low:.4g} to {high:.4g}: those of a trained "
                f"one are finite and below {_LIMIT}"
            )
        index = ((x_t.double() + _LIMIT) * _PER_UNIT).long().flatten()
        self._count += torch.bincount(index, minlength=len(self._count)).cpu()

    def below(self, x_t: float) -> int:
        """How many samples are harder than this, rounded to a bin: 1/4096 of a logit."""
        return int(self._count[: round((x_t + _LIMIT) * _PER_UNIT)].sum())

    def curve(self, gamma: float) -> Curve:
        """The cumulative distribution of FL with this gamma.

        The number of samples of a bin is exact, its loss is that of the bin's centre. ``error`` is
        computed for these samples from the loss at both ends of each bin: the share at the border
        of two bins lies between what the lowest and the highest possible losses make it. Within a
        bin, whose losses differ by a factor of at most 1 + r, the curve is convex and its distance
        from its chord is at most r / 4 of the bin's share.
        """
        (bin_,) = torch.where(
            self._count.flip(0) > 0
        )  # from the highest x_t: the lowest loss first
        count = self._count.flip(0)[bin_].double()
        right = _LIMIT - bin_.double() / _PER_UNIT
        loss = FocalLoss(gamma=gamma).value
        lowest, centre, highest = (
            count * loss(right - part / _PER_UNIT) for part in (0.0, 0.5, 1.0)
        )
        share = centre.cumsum(0) / centre.sum()
        least, most = lowest.cumsum(0), highest.cumsum(0)
        low = least / (least + most[-1] - most)
        high = most / (most + least[-1] - least)
        at_borders = float(torch.maximum(high - share, share - low).max())
        within = float(((highest - lowest) / least[-1]).max()) / 4
        start = torch.zeros(1, dtype=torch.float64)
        fraction = count.cumsum(0) / count.sum()
        return Curve(
            torch.cat((start, fraction)).numpy(),
            torch.cat((start, share)).numpy(),
            at_borders + within,
        )
