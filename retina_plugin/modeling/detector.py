"""The detector: it wires pyramid, head, assignment and loss, and adds nothing of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    ClassificationLoss,
    DenseLoss,
    DenseTargets,
    anchor_losses,
    check_backend,
    dense_classification_loss,
    sampled_classification_loss,
)

from .anchors import AnchorGenerator, to_device
from .box_regression import BoxTransform, box_loss_sums
from .head import RETINANET_HEAD_REGISTRY
from .inference import DenseInference
from .labeling import AnchorLabeler
from .matcher import AnchorMatcher
from .normalizer import LossNormalizer
from .sampling import ANCHOR_SAMPLER_REGISTRY
from .shapes import gather_anchors

__all__ = ["FocalRetinaNet"]

LOG_PERIOD = 20  # of Detectron2's writers


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(DenseDetector):
    """RetinaNet (section 4, Figure 3) from exchangeable parts.

    A drop-in for Detectron2's ``RetinaNet``: the same config keys with the same meaning, the same
    names and shapes in the state dict, the same inputs and outputs (``DenseDetector.forward``).
    Images are normalised and padded by Detectron2's ``DenseDetector``.

    Args:
        backbone: gives the features that ``head_in_features`` names.
        head: features -> (logits, deltas), see :class:`~retina_plugin.modeling.head.RetinaHead`.
        anchor_generator: features -> per level ``Boxes`` (Hi*Wi*A, 4).
        labeler: anchors and ground truth -> ``DenseTargets``.
        sampler: chooses the anchors that the classification loss sees.
        cls_loss: elementwise classification loss.
        box_loss: box loss of the positives.
        normalizer: positives of each image -> divisors of both losses.
        inference: dense predictions -> detections.
        box2box_transform: encodes boxes as deltas and back.
        num_classes: K.
        loss_backend, loss_in_place: see ``dense_classification_loss``.
        vis_period: every so many iterations ground truth and predictions go to the event storage
            as a picture; 0 never.
        input_format: channel order of the images, for the picture ("BGR" or "RGB").
        pixel_mean, pixel_std: by channel in the order of ``input_format``; pixels are 0 to 255.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        labeler: Any,
        sampler: Any,
        cls_loss: ClassificationLoss,
        box_loss: Any,
        normalizer: nn.Module,
        inference: Any,
        box2box_transform: Any,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
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
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        check_backend(loss_backend, here=False)  # to detect with, another machine's will do
        if loss_in_place and vis_period > 0:
            raise ConfigError(
                "MODEL.RETINANET.LOSS_IN_PLACE overwrites the logits that the pictures of "
                f"VIS_PERIOD {vis_period} are made from: set one of them to False or 0"
            )
        self.loss_backend, self.loss_in_place = loss_backend, loss_in_place
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        retinanet = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        head_shapes = [shapes[f] for f in retinanet.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, head_shapes)
        if type(anchor_generator) is DefaultAnchorGenerator:
            anchor_generator = AnchorGenerator(cfg, head_shapes)
        transform = BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS)
        matcher = AnchorMatcher(
            retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, retinanet.LOW_QUALITY_MATCHES
        )
        return {
            "backbone": backbone,
            "head": RETINANET_HEAD_REGISTRY.build(cfg, head_shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": anchor_generator,
            "labeler": AnchorLabeler(matcher, retinanet.NUM_CLASSES, retinanet.IGNORE_IOF_THRESH),
            "sampler": ANCHOR_SAMPLER_REGISTRY.build(cfg),
            "cls_loss": CLS_LOSS_REGISTRY.build(cfg),
            "box_loss": BOX_LOSS_REGISTRY.build(cfg),
            "normalizer": LossNormalizer(retinanet.NORMALIZER),
            "inference": DenseInference(
                num_classes=retinanet.NUM_CLASSES,
                box2box_transform=transform,
                score_thresh=retinanet.SCORE_THRESH_TEST,
                topk_candidates=retinanet.TOPK_CANDIDATES_TEST,
                nms_thresh=retinanet.NMS_THRESH_TEST,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
            "box2box_transform": transform,
            "num_classes": retinanet.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "loss_backend": retinanet.LOSS_BACKEND,
            "loss_in_place": retinanet.LOSS_IN_PLACE,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def extra_repr(self) -> str:
        # these are no modules; the trainer logs the model, and this says what it is trained with
        return f"cls_loss={self.cls_loss}, box_loss={self.box_loss}"

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
        """``DenseDetector.forward``, which see, without its waits for an accelerator."""
        inputs = [{**x, "image": to_device(x["image"], self.device)} for x in batched_inputs]
        if not self.training:
            return super().forward(inputs)
        if not all("instances" in x for x in batched_inputs):
            raise ConfigError(
                "a training image has no 'instances': give it a mapper made for training "
                "(is_train=True), or call model.eval() to detect"
            )
        # on the host, where a selection does not wait
        objects, crowds = self._split_crowds([x["instances"] for x in batched_inputs])
        images = self.preprocess_image(inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        arguments = images, features, self.head(features), to_device(objects, self.device)
        if crowds is None:
            return self.forward_training(*arguments)
        return self.forward_training(*arguments, crowds=to_device(crowds, self.device))

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
        crowds: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{"loss_cls", "loss_box_reg"}: scalars, to be added up (section 4.1, "Optimization").

        ``crowds``: (C, 4) boxes of each image that are no objects, for the labeler; None where they
        are still among the instances.
        """
        if crowds is None:
            gt_instances, crowds = self._split_crowds(gt_instances)
        logits, deltas = predictions
        level_anchors = self.anchor_generator(features)
        anchors_R4 = Boxes.cat(level_anchors).tensor
        targets = self.labeler(
            anchors_R4,
            [x.gt_boxes.tensor for x in gt_instances],
            [x.gt_classes for x in gt_instances],
            crowds,
        )
        divisor_N = self.normalizer(targets.num_positives_N())
        cls_sums, cls_divisor_N = self._cls_loss_sums(
            anchors_R4, logits, deltas, targets, divisor_N
        )
        box_sum_N = box_loss_sums(
            self.box_loss, self.box2box_transform, anchors_R4, deltas, targets
        )
        self._log(level_anchors, targets, cls_sums, cls_divisor_N)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self._visualize(images, gt_instances, features, predictions)
        return {
            "loss_cls": (cls_sums.total / cls_divisor_N).sum(),
            "loss_box_reg": (box_sum_N / divisor_N).sum(),
        }

    def _split_crowds(
        self, gt_instances: list[Instances]
    ) -> tuple[list[Instances], list[Tensor] | None]:
        """Objects, and the boxes of crowds where the mapper has kept them (``gt_ignore``)."""
        wanted = getattr(self.labeler, "ignore_iof_thresh", None) is not None
        kept = [x.has("gt_ignore") for x in gt_instances]
        if not wanted and not any(kept):
            return gt_instances, None
        if not all(kept):
            raise ConfigError(
                "MODEL.RETINANET.IGNORE_IOF_THRESH needs the field gt_ignore of each image's "
                "instances: set INPUT.MAPPER FastMapper, add it in your own mapper, or set the key "
                "to None"
            )
        objects = [x[~x.gt_ignore] for x in gt_instances]
        return objects, [x.gt_boxes.tensor[x.gt_ignore] for x in gt_instances]

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
    ) -> list[Instances]:
        """Detections of each image in the network's frame; the caller rescales and clips them."""
        logits, deltas = predictions
        return self.inference(self.anchor_generator(features), logits, deltas, images.image_sizes)

    def _cls_loss_sums(
        self,
        anchors_R4: Tensor,
        logits: list[Tensor],
        deltas: list[Tensor],
        targets: DenseTargets,
        divisor_N: Tensor,
    ) -> tuple[DenseLoss, Tensor]:
        """Sums by image over the sampler's anchors, and what they are divided by."""

        def score_anchors() -> Tensor:
            return anchor_losses(logits, targets, self.cls_loss, self.num_classes)

        def predict_boxes(n: int, anchor: Tensor) -> Tensor:
            deltas_S4 = gather_anchors(deltas, torch.full_like(anchor, n), anchor, 4)
            return self.box2box_transform.apply_deltas(deltas_S4, anchors_R4[anchor])

        sample = self.sampler(targets, score_anchors, predict_boxes)
        if sample is None:
            sums = dense_classification_loss(
                logits,
                targets,
                self.cls_loss,
                self.num_classes,
                backend=self.loss_backend,
                expected_grad_N=1 / divisor_N,
                in_place=self.loss_in_place,
            )
            return sums, divisor_N
        logits_SK = gather_anchors(logits, sample.image, sample.anchor, self.num_classes)
        sums = sampled_classification_loss(
            logits_SK, sample.image, sample.anchor, targets, self.cls_loss
        )
        # a minibatch's loss is its mean (section 5.1), and the batch's that of its images
        kept_N = torch.bincount(sample.image, minlength=targets.num_images)
        return sums, kept_N.clamp(min=1).float() * targets.num_images

    @torch.no_grad()
    def _visualize(
        self,
        images: ImageList,
        gt_instances: list[Instances],
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
    ) -> None:
        """Ground truth and predictions of the first image, as a picture in the event storage."""
        pixels = (images[0] * self.pixel_std + self.pixel_mean).round()
        results = self.forward_inference(images, features, predictions)
        self.visualize_training(
            [{"image": pixels, "instances": gt_instances[0].to("cpu")}], results[:1]
        )

    @torch.no_grad()
    def _log(
        self, anchors: list[Boxes], targets: DenseTargets, cls_sums: DenseLoss, divisor_N: Tensor
    ) -> None:
        """Scalars for TensorBoard. ``num_pos_anchors`` (mean over images) is Detectron2's name."""
        storage = get_event_storage()
        # each number waits for the accelerator: as often as Detectron2's trainer writes them
        if anchors[0].device.type != "cpu" and (storage.iter + 1) % LOG_PERIOD:
            return
        per_level = [
            (label >= 0).sum().item() / targets.num_images
            for label in targets.label_NR.split([len(a) for a in anchors], dim=1)
        ]
        storage.put_scalar("num_pos_anchors", sum(per_level))
        for name, count in zip(self.head_in_features, per_level):
            storage.put_scalar(f"retinanet/num_pos_{name}", count)
        storage.put_scalars(
            **{
                "retinanet/cls_foreground": (cls_sums.foreground / divisor_N).sum().item(),
                "retinanet/cls_background": (cls_sums.background / divisor_N).sum().item(),
                # the mean over images where the mode divides image by image
                "retinanet/normalizer": divisor_N.mean().item(),
            }
        )
