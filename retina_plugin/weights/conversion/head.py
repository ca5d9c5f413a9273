"""The head: what the state dicts of several libraries have in another form."""

from __future__ import annotations

import re

from torch import Tensor

__all__ = ["add_conv_biases", "sizes_first"]


def sizes_first(value: Tensor, num_ratios: int, num_sizes: int) -> Tensor:
    """The channels of a last conv in Detectron2's order of the anchors of a location.

    Args:
        value: weight or bias, whose channels are ordered by aspect ratio, then size; here they are
            ordered by size, then aspect ratio.
    """
    return value.unflatten(0, (num_ratios, num_sizes, -1)).transpose(0, 1).flatten(0, 2)


def add_conv_biases(state: dict[str, Tensor]) -> None:
    """Give the convs of the subnets a bias of 0 where they have none, in place.

    Other libraries leave the bias out where GroupNorm follows; Detectron2's head has one.

    Args:
        state: with our names.
    """
    for name, weight in list(state.items()):
        if re.fullmatch(r"head\.\w+_subnet\.\d+\.weight", name) and weight.dim() == 4:
            state.setdefault(name.replace("weight", "bias"), weight.new_zeros(len(weight)))
