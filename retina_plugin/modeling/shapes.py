"""The axes, named once, and the way from the anchors' order to the head's layout.

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

__all__ = ["gather_anchors"]


def gather_anchors(levels: Sequence[Tensor], image: Tensor, anchor: Tensor, depth: int) -> Tensor:
    """Rows of some anchors, without permuting or concatenating the levels.

    Args:
        levels: L tensors (N, A*D, Hi, Wi) from the head.
        image, anchor: (P,) indices into N and R.
        depth: D, the outputs of one anchor.

    Returns:
        (P, D), differentiable; rows come in the order of ``anchor``.
    """
    rows = levels[0].new_zeros(len(anchor), depth)
    start = 0
    for x in levels:
        x = x.unflatten(1, (-1, depth))  # (N, A, D, H, W)
        A, H, W = x.shape[1], x.shape[3], x.shape[4]
        index = anchor - start
        here = (index >= 0) & (index < H * W * A)
        # of other levels anything is looked up: to select would wait for an accelerator. Not always
        # the same entry: its gradient would be added up in a queue.
        index = index % (H * W * A)
        place = index.div(A, rounding_mode="floor")
        row = place.div(W, rounding_mode="floor")
        rows = torch.where(here[:, None], x[image, index % A, :, row, place % W], rows)
        start += H * W * A
    return rows
