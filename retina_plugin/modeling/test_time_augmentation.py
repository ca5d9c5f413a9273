"""Detecting in several views of an image: other sizes, mirrored (``TEST.AUG``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from retina_plugin.errors import ConfigError

from .merging import Detections, fuse_views

__all__ = ["Resize", "RetinaNetWithTTA"]

_WBF_IOU_THRESH = 0.55  # the paper's (arXiv:1910.13302); better than .5 on the embedded digits

Resize = Callable[[np.ndarray], Tensor]  # (H, W, C) image -> (C, H', W'), as a mapper does it


class RetinaNetWithTTA(nn.Module):
    """A detector with test-time augmentation.

    Each view goes through the whole detector, with its NMS (or other ``TEST.MERGE``) and its most
    detections of an image. Their boxes are brought back to the image, clipped to it as the detector
    clips them, and merged. So a single view gives what the detector gives for it, to the bit.

    Peer: ``detectron2.modeling.GeneralizedRCNNWithTTA``, which takes R-CNN only. As there, views
    are resized first and then mirrored.

    Args:
        model: the detector; of ``DistributedDataParallel`` the module inside. It gives Instances
            with ``pred_boxes``, ``scores`` and ``pred_classes``; other fields are left out.
        resizes: one for each size of a view.
        flip: whether each view is also taken mirrored (horizontally).
        merge: a name of :func:`.merging.build_merge`.
        iou_thresh: IoU above which detections of two views mean the same object.
        max_detections: most detections of an image.

    Example::

        views = RetinaNetWithTTA.build(cfg, model, build_resizes(cfg)).eval()
        image = torch.as_tensor(cv2.imread("a.jpg").transpose(2, 0, 1))  # in its original size
        instances = views([{"image": image}])[0]["instances"]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        resizes: Sequence[Resize],
        flip: bool = True,
        merge: str = "wbf",
        iou_thresh: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.model = getattr(model, "module", model)
        self.training = model.training
        self.resizes = tuple(resizes)
        self.flip = flip
        self.merge = merge
        self.iou_thresh = iou_thresh
        self.max_detections = max_detections

    @classmethod
    def build(cls, cfg: CfgNode, model: nn.Module, resizes: Sequence[Resize]) -> RetinaNetWithTTA:
        """Reads ``TEST.AUG``.

        Args:
            resizes: see :func:`retina_plugin.data.views.build_resizes`, which reads the sizes.
        """
        merge, nms_thresh = cfg.TEST.AUG.MERGE, cfg.MODEL.RETINANET.NMS_THRESH_TEST
        return cls(
            model,
            resizes=resizes,
            flip=cfg.TEST.AUG.FLIP,
            merge=merge,
            iou_thresh=_WBF_IOU_THRESH if merge == "wbf" else nms_thresh,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """Detect in images of their original sizes.

        Args:
            batched_inputs: dicts with "image" (C, H, W), and "height" and "width" of the image
                whose pixels the boxes are in, if that has another size.

        Returns:
            {"instances"} of each image, as the detector gives them.

        Raises:
            ConfigError: ``torch.jit.trace`` calls it.
        """
        if torch.jit.is_tracing():  # the resized images would be constants of the trace
            raise ConfigError(
                "several views of an image cannot be traced: trace the model with "
                "TEST.AUG.ENABLED False, and call the trace for each view"
            )
        found: list[list[Detections]] = [[] for _ in batched_inputs]
        for resize in self.resizes:
            # Images of one size after the resize make a batch without padding.
            batches: dict[tuple[int, ...], list[int]] = defaultdict(list)
            views = []
            for i, x in enumerate(batched_inputs):
                view = resize(np.ascontiguousarray(x["image"].cpu().numpy().transpose(1, 2, 0)))
                views.append({"image": view, **_size(x)})
                batches[tuple(view.shape)].append(i)
            for batch in batches.values():
                self._detect([views[i] for i in batch], [found[i] for i in batch])
        results = []
        for x, detections in zip(batched_inputs, found):
            boxes, scores, classes = (
                part[: self.max_detections]
                for part in fuse_views(detections, iou_thresh=self.iou_thresh, name=self.merge)
            )
            size = _size(x)
            instances = Instances((size["height"], size["width"]))
            instances.pred_boxes, instances.scores = Boxes(boxes), scores
            instances.pred_classes = classes
            results.append({"instances": instances})
        return results

    def _detect(self, views: list[dict[str, Any]], found: list[list[Detections]]) -> None:
        """Append the detections in views of equal size, and in their mirror images."""
        mirrored = [{**x, "image": x["image"].flip(-1)} for x in views] if self.flip else []
        outputs = self.model(views + mirrored)
        for i, output in enumerate(outputs):
            instances, view = output["instances"], i % len(views)
            boxes = instances.pred_boxes.tensor
            if i >= len(views):
                x1, y1, x2, y2 = boxes.unbind(1)
                width = views[view]["width"]
                boxes = torch.stack((width - x2, y1, width - x1, y2), dim=1)
            found[view].append((boxes, instances.scores, instances.pred_classes))


def _size(x: Mapping[str, Any]) -> dict[str, int]:
    """Height and width of the image that the boxes of an input are in (pixels)."""
    height, width = x["image"].shape[-2:]
    return {"height": x.get("height", height), "width": x.get("width", width)}
