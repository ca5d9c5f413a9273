"""The detector: it only wires pyramid, head, assignment and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    BoxLoss,
    ClassificationLoss,
    check_backend,
)

from .anchors import AnchorGenerator
from .box_regression import BoxTransform, box_loss_sums
from .classification import cls_loss_sums
from .contracts import BoxCoder, Inference, Labeler, Sampler
from .head import RETINANET_HEAD_REGISTRY
from .inference import DenseInference, rescale_detections
from .labeling import AnchorLabeler
from .matcher import AnchorMatcher
from .merging import build_merge
from .monitoring import LOG_PERIOD, first_image, training_scalars
from .normalizer import LossNormalizer
from .pyramid import freeze_unused_levels
from .sampling import ANCHOR_SAMPLER_REGISTRY
from .transfer import to_device

__all__ = ["FocalRetinaNet"]


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(DenseDetector):
    """RetinaNet (section 4, Figure 3) from exchangeable parts.

    A drop-in for Detectron2's ``RetinaNet``: the same config keys with the same meaning, the same
    names and shapes in the state dict, the same inputs and outputs (``DenseDetector.forward``).
    ``DenseDetector`` normalises and pads the images.

    Args:
        backbone: images -> the features that ``head_in_features`` names.
        head: features -> (logits, deltas), see :class:`~retina_plugin.modeling.head.RetinaHead`.
        anchor_generator: features -> per level ``Boxes`` (Hi*Wi*A, 4).
        labeler: anchors and ground truth -> ``DenseTargets``.
        sampler: chooses the anchors that the classification loss sees.
        cls_loss: elementwise classification loss.
        box_loss: box loss of the positive anchors.
        normalizer: numbers of positive anchors (N,) -> divisors of both losses (N,).
        inference: anchors and head output -> detections in the network's frame.
        postprocess: (detections, height, width) -> detections in an image of that size.
        box2box_transform: encodes boxes as deltas and decodes them.
        num_classes: K.
        loss_backend, loss_in_place: see ``dense_classification_loss``.
        vis_period: iterations from one picture of ground truth and detections in the event storage
            to the next; 0 for none.
        input_format: channel order of the images, for the picture ("BGR" or "RGB").
        pixel_mean, pixel_std: of each channel, in the order of ``input_format``; pixels are 0 to
            255.

    Raises:
        ConfigError: an unknown ``loss_backend``; ``loss_in_place`` together with ``vis_period``.

    Example:
        With ``cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"``::

            model = detectron2.modeling.build_model(cfg).eval()  # random weights
            retina_plugin.weights.Checkpointer(model).load(cfg.MODEL.WEIGHTS)
            image = torch.as_tensor(cv2.imread("a.jpg").transpose(2, 0, 1))  # (3, H, W), BGR
            instances = model([{"image": image}])[0]["instances"]
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        labeler: Labeler,
        sampler: Sampler,
        cls_loss: ClassificationLoss,
        box_loss: BoxLoss,
        normalizer: nn.Module,
        inference: Inference,
        box2box_transform: BoxCoder,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        postprocess: Callable[[Instances, int, int], Instances] = detector_postprocess,
        loss_backend: str = "auto",
        loss_in_place: bool = False,
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.labeler = labeler
        self.sampler = sampler
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.normalizer = normalizer
        self.inference = inference
        self.postprocess = postprocess
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        # Only that the name is known: inference needs no loss, so the backend may be missing here.
        check_backend(loss_backend, here=False)
        if loss_in_place and vis_period > 0:
            raise ConfigError(
                "MODEL.RETINANET.LOSS_IN_PLACE overwrites the logits that the pictures of "
                f"VIS_PERIOD {vis_period} are made from: set one of them to False or 0"
            )
        self.loss_backend, self.loss_in_place = loss_backend, loss_in_place
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        retinanet = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        head_shapes = [shapes[f] for f in retinanet.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, head_shapes)
        if type(anchor_generator) is DefaultAnchorGenerator:
            anchor_generator = AnchorGenerator(cfg, head_shapes)
        box_coder = BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS)
        matcher = AnchorMatcher(
            retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, retinanet.LOW_QUALITY_MATCHES
        )
        return {
            "backbone": freeze_unused_levels(backbone, retinanet.IN_FEATURES),
            "head": RETINANET_HEAD_REGISTRY.build(cfg, head_shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": anchor_generator,
            "labeler": AnchorLabeler(matcher, retinanet.NUM_CLASSES, retinanet.IGNORE_IOF_THRESH),
            "sampler": ANCHOR_SAMPLER_REGISTRY.build(cfg),
            "cls_loss": CLS_LOSS_REGISTRY.build(cfg),
            "box_loss": BOX_LOSS_REGISTRY.build(cfg),
            "normalizer": LossNormalizer(retinanet.NORMALIZER),
            "inference": DenseInference(
                boxes_outside=retinanet.BOXES_OUTSIDE_TEST,
                **_padding(backbone, [shape.stride for shape in head_shapes]),
                num_classes=retinanet.NUM_CLASSES,
                box2box_transform=box_coder,
                score_thresh=retinanet.SCORE_THRESH_TEST,
                topk_candidates=retinanet.TOPK_CANDIDATES_TEST,
                nms_thresh=retinanet.NMS_THRESH_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                merge=(
                    None
                    if cfg.TEST.MERGE == "nms"  # done by the inference itself
                    else build_merge(cfg.TEST.MERGE, iou_thresh=retinanet.NMS_THRESH_TEST)
                ),
            ),
            "postprocess": (
                rescale_detections
                if retinanet.BOXES_OUTSIDE_TEST == "clip"
                else detector_postprocess
            ),
            "box2box_transform": box_coder,
            "num_classes": retinanet.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "loss_backend": retinanet.LOSS_BACKEND,
            "loss_in_place": retinanet.LOSS_IN_PLACE,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def extra_repr(self) -> str:
        # PyTorch prints submodules only, and the losses are none
        return f"cls_loss={self.cls_loss}, box_loss={self.box_loss}"

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``.

        Raises:
            ConfigError: always. PyTorch has deprecated it, and it takes a part of Python only.
        """
        raise ConfigError(
            "FocalRetinaNet cannot be scripted (torch.jit.script is deprecated): `retina export` "
            "writes it as ONNX, pt2 or OpenVINO, and detectron2.export.TracingAdapter traces it"
        )

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
        """Same contract as ``DenseDetector.forward``, without GPU synchronisation.

        Raises:
            ConfigError: a training image has no ``instances``.
        """
        inputs = [{**x, "image": to_device(x["image"], self.device)} for x in batched_inputs]
        if not self.training:
            return self._detect(inputs)
        if not all("instances" in x for x in inputs):
            raise ConfigError(
                "a training image has no 'instances': give it a mapper made for training "
                "(is_train=True), or call model.eval() to detect"
            )
        images = self.preprocess_image(inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        gt_instances = to_device([x["instances"] for x in inputs], self.device)
        return self.forward_training(images, features, self.head(features), gt_instances)

    def _detect(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """``DenseDetector.forward`` in inference, with this detector's ``postprocess``."""
        images = self.preprocess_image(inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        found = self.forward_inference(images, features, self.head(features))
        results = []
        for detections, x, size in zip(found, inputs, images.image_sizes):
            height, width = x.get("height", size[0]), x.get("width", size[1])
            results.append({"instances": self.postprocess(detections, height, width)})
        return results

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """{"loss_cls", "loss_box_reg"}: two scalars, whose sum is the loss (section 4.1)."""
        logits, deltas = predictions
        level_anchors = self.anchor_generator(features)
        anchors_R4 = Boxes.cat(level_anchors).tensor
        targets = self.labeler(anchors_R4, gt_instances)
        divisor_N = self.normalizer(targets.num_positives_N())
        cls_sums, cls_divisor_N = cls_loss_sums(
            self.cls_loss,
            self.sampler,
            self.box2box_transform,
            anchors_R4,
            logits,
            deltas,
            targets,
            divisor_N,
            num_classes=self.num_classes,
            backend=self.loss_backend,
            in_place=self.loss_in_place,
        )
        box_sum_N = box_loss_sums(
            self.box_loss, self.box2box_transform, anchors_R4, deltas, targets
        )
        storage = get_event_storage()
        # Each scalar synchronises with a GPU. So on a GPU there are scalars only in the iterations
        # in which Detectron2's writers write.
        if self.device.type == "cpu" or (storage.iter + 1) % LOG_PERIOD == 0:
            level_sizes = dict(zip(self.head_in_features, map(len, level_anchors)))
            scalars = training_scalars(level_sizes, targets, cls_sums, cls_divisor_N)
            # What is not finite stops or skips the step, and would be no JSON in metrics.json.
            storage.put_scalars(**{k: v for k, v in scalars.items() if math.isfinite(v)})
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            detections = self.forward_inference(images, features, predictions)
            truth = first_image(images, gt_instances, self.pixel_mean, self.pixel_std)
            self.visualize_training([truth], detections[:1])
        return {
            "loss_cls": (cls_sums.total / cls_divisor_N).sum(),
            "loss_box_reg": (box_sum_N / divisor_N).sum(),
        }

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
    ) -> list[Instances]:
        """Detections of each image in the network's frame; the caller rescales and clips them."""
        logits, deltas = predictions
        return self.inference(self.anchor_generator(features), logits, deltas, images.image_sizes)


def _padding(backbone: Backbone, strides: Sequence[int]) -> dict[str, Any]:
    """What ``DenseInference`` has to know of how a backbone's images are padded.

    A backbone that pads every image to the same square has no other sizes in a batch.
    """
    constraints = backbone.padding_constraints
    if constraints.get("square_size", 0) > 0:
        return {}
    divisibility = constraints.get("size_divisibility", backbone.size_divisibility)
    return {"strides": strides, "size_divisibility": divisibility}
