"""What a training step shows in TensorBoard: scalars and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor

from retina_plugin.losses import DenseLoss, DenseTargets

from .transfer import sum_over_processes

__all__ = ["LOG_PERIOD", "MeanOverPasses", "first_image", "training_scalars"]

# Iterations from one write of Detectron2's writers to the next.
LOG_PERIOD = 20


@torch.no_grad()
def training_scalars(
    level_sizes: Mapping[str, int], targets: DenseTargets, cls_sums: DenseLoss, divisor_N: Tensor
) -> dict[str, float]:
    """Scalars of a training step by name, of the images of all processes.

    They are copied from the device together, which synchronises with a GPU once, and they are added
    up over the processes together. So all processes must call this in the same iterations.

    Args:
        level_sizes: level ("p3") -> its number of anchors.
        targets: labels of the batch.
        cls_sums, divisor_N: sums of the classification loss and what they are divided by.

    Returns:
        - ``num_pos_anchors``: positive anchors, mean over images; the name is Detectron2's.
        - ``retinanet/num_pos_<level>``: the same for one level.
        - ``retinanet/cls_foreground``, ``retinanet/cls_background``: the parts of ``loss_cls`` with
          label 1 and label 0. As every loss, they are means over processes.
        - ``retinanet/normalizer``: the divisor, mean over images.
    """
    labels = targets.label_NR.split(list(level_sizes.values()), dim=1)
    # Sums over the images; float64 counts exactly.
    sums = [(label >= 0).sum().double() for label in labels]
    sums += [
        divisor_N.new_tensor(targets.num_images, dtype=torch.float64),
        divisor_N.sum().double(),
        (cls_sums.foreground / divisor_N).sum().double(),
        (cls_sums.background / divisor_N).sum().double(),
    ]
    totals = sum_over_processes(torch.stack(sums)).tolist()
    *positives, num_images, divisors, foreground, background = totals
    return {
        "num_pos_anchors": sum(positives) / num_images,
        **{f"retinanet/num_pos_{k}": x / num_images for k, x in zip(level_sizes, positives)},
        "retinanet/cls_foreground": foreground / comm.get_world_size(),
        "retinanet/cls_background": background / comm.get_world_size(),
        "retinanet/normalizer": divisors / num_images,
    }


class MeanOverPasses(EventStorage):
    """The event storage of a step that splits its batch into passes (``SOLVER.ACCUMULATE``).

    A model puts its scalars once a pass. This storage keeps them, and at the end of the ``with``
    block it puts their means into the storage around it. Pictures and histograms go there at once.

        with MeanOverPasses(get_event_storage()):
            for part in parts:
                model(part)
    """

    def __init__(self, storage: EventStorage) -> None:
        super().__init__(storage.iter)
        self._around = storage

    def put_image(self, *args: Any, **kwargs: Any) -> None:
        self._around.put_image(*args, **kwargs)

    def put_histogram(self, *args: Any, **kwargs: Any) -> None:
        self._around.put_histogram(*args, **kwargs)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None:
            hints = self.smoothing_hints()
            for name, history in self.histories().items():
                values, iterations = zip(*history.values())
                self._around.put_scalar(
                    name,
                    sum(values) / len(values),
                    smoothing_hint=hints[name],
                    cur_iter=iterations[-1],
                )


def first_image(
    images: ImageList, gt_instances: list[Instances], pixel_mean: Tensor, pixel_std: Tensor
) -> dict[str, Any]:
    """Pixels (0 to 255) and objects, without crowds, of the first image."""
    instances = gt_instances[0].to("cpu")
    if instances.has("gt_iscrowd"):
        instances = instances[~instances.gt_iscrowd.bool()]
    return {"image": (images[0] * pixel_std + pixel_mean).round(), "instances": instances}
