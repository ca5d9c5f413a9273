"""The label maps that backends read."""

import pytest
import torch

from retina_plugin.losses.targets import BACKGROUND, IGNORED
from tests.losses.reference import targets_of


def labels_of(shapes, N, A):
    return torch.arange(N * sum(h * w * A for h, w in shapes)).view(N, -1) % 9 + IGNORED


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("A, K", [(3, 5), (1, 5), (3, 1), (1, 1)])
def test_labels_have_the_memory_layout_of_the_logits(A, K, layout):
    """Also for a level of one position, one row, one column or one channel."""
    shapes, N = [(4, 6), (1, 6), (6, 1), (1, 1)], 2
    label_NR = labels_of(shapes, N, A).clamp(max=K - 1)
    logits = [torch.zeros(N, A * K, h, w).contiguous(memory_format=layout) for h, w in shapes]
    maps = list(targets_of(label_NR).label_maps(logits, K))
    for x, (labels, channels_last) in zip(logits, maps):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert labels.dtype == torch.int16 and labels.shape == (N, A, *x.shape[2:])
        assert labels.is_contiguous(memory_format=memory_format)
        assert x.is_contiguous(memory_format=memory_format)
    flat = [m.labels_NAHW.permute(0, 2, 3, 1).reshape(N, -1) for m in maps]
    assert torch.equal(torch.cat(flat, dim=1).long(), label_NR)  # (level, row, column, anchor)


def test_layout_of_slices_and_of_a_column_with_an_odd_stride():
    """A view of some channels has the layout of the whole; a stride of a size of 1 says nothing."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(2, 7, 4, 6).contiguous(memory_format=layout)[:, :5]
        (label_map,) = targets_of(torch.full((2, 24), BACKGROUND)).label_maps([x], 5)
        assert label_map.channels_last == (layout == torch.channels_last)
    column = torch.zeros(2 * 24 * 5).as_strided((2, 5, 24, 1), (120, 1, 5, 1))
    assert column.is_contiguous(memory_format=torch.channels_last)
    (label_map,) = targets_of(torch.full((2, 24), BACKGROUND)).label_maps([column], 5)
    assert label_map.channels_last
