"""The names of the axes, and how to read the head's output for some anchors.

    N  images of the batch
    L  pyramid levels; Hi, Wi the size of level i
    A  anchors at a location
    K  classes, background not counted
    R  anchors of all levels: sum of Hi * Wi * A
    P  positive anchors, M ignored anchors, G ground-truth boxes of an image

A tensor's name ends with its axes where that helps: ``logits_NRK``. The head's output is
(N, A*K, Hi, Wi) and (N, A*4, Hi, Wi) on each level. Anchors are ordered by level, row, column, and
anchor of the location.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gather_anchors"]


def gather_anchors(levels: Sequence[Tensor], image: Tensor, anchor: Tensor, depth: int) -> Tensor:
    """The head's output for some anchors, without permuting or concatenating the levels.

    Args:
        levels: L tensors (N, A*D, Hi, Wi) from the head.
        image, anchor: (P,) indices into N and R.
        depth: D, the number of outputs of one anchor.

    Returns:
        (P, D), differentiable, in the order of ``anchor``.
    """
    rows = levels[0].new_zeros(len(anchor), depth)
    start = 0
    for x in levels:
        x = x.unflatten(1, (-1, depth))  # (N, A, D, H, W)
        A, H, W = x.shape[1], x.shape[3], x.shape[4]
        index = anchor - start
        on_level = (index >= 0) & (index < H * W * A)
        # Anchors of other levels read an arbitrary entry, which ``where`` discards: boolean
        # indexing would synchronise. The entry varies, because one shared entry would serialise
        # the backward scatter.
        index = index % (H * W * A)
        location = index.div(A, rounding_mode="floor")
        row, column = location.div(W, rounding_mode="floor"), location % W
        rows = torch.where(on_level[:, None], x[image, index % A, :, row, column], rows)
        start += H * W * A
    return rows
