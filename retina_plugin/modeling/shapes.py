"""The axes, named once, and the permutes between the head's layout and the anchors' order.

    N  images of the batch
    L  pyramid levels; Hi, Wi the size of level i
    A  anchors at a location
    K  classes, background not counted
    R  anchors of all levels: sum of Hi * Wi * A
    P  positive anchors, M ignored anchors, G ground-truth boxes of an image

A tensor's name ends with its axes where that helps: ``logits_NRK``. The head gives (N, A*K, Hi, Wi)
and (N, A*4, Hi, Wi); anchors run through levels, then rows, columns and the A of a location.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gather_anchors", "permute_to_NRD"]


def permute_to_NRD(x: Tensor, depth: int) -> Tensor:
    """(N, A*D, H, W) -> (N, H*W*A, D): the head's output in the order of the anchors."""
    x = x.unflatten(1, (-1, depth))  # (N, A, D, H, W)
    return x.permute(0, 3, 4, 1, 2).flatten(1, 3)


def gather_anchors(levels: Sequence[Tensor], image: Tensor, anchor: Tensor, depth: int) -> Tensor:
    """Rows of some anchors, without permuting or concatenating the levels.

    Args:
        levels: L tensors (N, A*D, Hi, Wi) from the head.
        image, anchor: (P,) indices into N and R.
        depth: D, the outputs of one anchor.

    Returns:
        (P, D), differentiable, level by level: rows come back in the order of ``anchor``.
    """
    rows = levels[0].new_zeros(len(anchor), depth)
    start = 0
    for x in levels:
        x = x.unflatten(1, (-1, depth))  # (N, A, D, H, W)
        A, W = x.shape[1], x.shape[4]
        end = start + x[0].numel() // depth
        (here,) = torch.where((anchor >= start) & (anchor < end))
        index = anchor[here] - start
        place = index.div(A, rounding_mode="floor")
        row = place.div(W, rounding_mode="floor")
        rows = rows.index_put((here,), x[image[here], index % A, :, row, place % W])
        start = end
    return rows
