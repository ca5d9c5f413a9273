"""What a training step shows in TensorBoard: scalars and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor

from retina_plugin.losses import DenseLoss, DenseTargets

__all__ = ["LOG_PERIOD", "first_image", "training_scalars"]

# Iterations from one write of Detectron2's writers to the next.
LOG_PERIOD = 20


@torch.no_grad()
def training_scalars(
    level_sizes: Mapping[str, int], targets: DenseTargets, cls_sums: DenseLoss, divisor_N: Tensor
) -> dict[str, float]:
    """Scalars of a training step by name; each synchronises with a GPU.

    Args:
        level_sizes: level ("p3") -> its number of anchors.
        targets: labels of the batch.
        cls_sums, divisor_N: sums of the classification loss and what they are divided by.

    Returns:
        - ``num_pos_anchors``: positive anchors, mean over images; the name is Detectron2's.
        - ``retinanet/num_pos_<level>``: the same for one level.
        - ``retinanet/cls_foreground``, ``retinanet/cls_background``: the parts of ``loss_cls`` with
          label 1 and label 0.
        - ``retinanet/normalizer``: the divisor, mean over images.
    """
    labels = targets.label_NR.split(list(level_sizes.values()), dim=1)
    positives = [(label >= 0).sum().item() / targets.num_images for label in labels]
    return {
        "num_pos_anchors": sum(positives),
        **{f"retinanet/num_pos_{name}": x for name, x in zip(level_sizes, positives)},
        "retinanet/cls_foreground": (cls_sums.foreground / divisor_N).sum().item(),
        "retinanet/cls_background": (cls_sums.background / divisor_N).sum().item(),
        "retinanet/normalizer": divisor_N.mean().item(),
    }


def first_image(
    images: ImageList, gt_instances: list[Instances], pixel_mean: Tensor, pixel_std: Tensor
) -> dict[str, Any]:
    """Pixels (0 to 255) and objects, without crowds, of the first image."""
    instances = gt_instances[0].to("cpu")
    if instances.has("gt_iscrowd"):
        instances = instances[~instances.gt_iscrowd.bool()]
    return {"image": (images[0] * pixel_std + pixel_mean).round(), "instances": instances}
