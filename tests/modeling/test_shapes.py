"""Gathering some anchors equals indexing the permuted levels."""

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

from retina_plugin.modeling.shapes import gather_anchors

LEVELS = [torch.randn(2, 3 * 4, 5, 7), torch.randn(2, 3 * 4, 2, 3)]


def test_gather_equals_indexing_after_permute_and_concatenate():
    flat = torch.cat([permute_to_N_HWA_K(x, 4) for x in LEVELS], dim=1)
    image = torch.randint(2, (50,))
    anchor = torch.randint(flat.shape[1], (50,))
    assert torch.equal(gather_anchors(LEVELS, image, anchor, 4), flat[image, anchor])


def test_gathering_no_anchors_gives_every_level_a_zero_gradient():
    levels = [x.clone().requires_grad_() for x in LEVELS]
    none = torch.zeros(0, dtype=torch.int64)
    gather_anchors(levels, none, none, 4).sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in levels)
