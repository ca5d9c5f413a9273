"""What the benchmark compares: for each stage the same work by Detectron2, torchvision and us."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import cat
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.ops import box_iou

from retina_plugin.losses import DenseTargets, FocalLoss, dense_classification_loss, native
from retina_plugin.losses.regression import SmoothL1
from retina_plugin.modeling.inference import DenseInference
from retina_plugin.modeling.labeling import AnchorLabeler
from retina_plugin.modeling.matcher import AnchorMatcher
from retina_plugin.modeling.shapes import gather_anchors

__all__ = ["PEERS", "Contest", "loss", "matching", "postprocess"]

PEERS = ("detectron2", "torchvision")

K, A = 80, 9
# levels P3 to P7 of an image of 800 x 1344 pixels: 201,600 anchors
LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
IMAGE_SIZE = (800, 1344)
TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


@dataclass
class Contest:
    """Contenders do the same work; the first is who the others are compared with.

    ``check`` gets everybody's result, raises AssertionError where one is wrong and returns in words
    how far they agree. ``rounds`` bounds the rounds of what takes long; ``memory`` is False where
    torch's allocator does not see what is used.
    """

    stage: str
    name: str
    contenders: Mapping[str, Callable[..., Any]]  # called without arguments
    check: Callable[[dict[str, Any]], str]
    rounds: int = 100
    memory: bool = True


def anchors_of(device: str) -> list[Boxes]:
    """The paper's anchors on the levels above."""
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16, 32, 64, 128]
    )
    return generator.to(device)([torch.empty(1, 1, h, w, device=device) for h, w in LEVELS])


def boxes_in_image(count: int, generator: torch.Generator, device: str) -> Tensor:
    """(count, 4) boxes of 10 to 400 pixels, as uneven as real ones."""
    height, width = IMAGE_SIZE
    size = 10 * 40 ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], dim=1).to(device)


def agree(got: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=0)


# --- loss ------------------------------------------------------------------------------------


def loss(device: str) -> Iterator[Contest]:
    """Forward and backward of both losses from the raw output of the head."""
    for dtype in (torch.float32, torch.bfloat16):
        yield classification(device, dtype)
    yield box_regression(device)


def targets_of(device: str, num_images: int = 2, boxes: int = 20) -> DenseTargets:
    generator = torch.Generator().manual_seed(0)
    labeler = AnchorLabeler(AnchorMatcher((0.4, 0.5), (0, -1, 1)), K)
    gt = [boxes_in_image(boxes, generator, device) for _ in range(num_images)]
    classes = [torch.randint(K, (boxes,), generator=generator).to(device) for _ in gt]
    return labeler(Boxes.cat(anchors_of(device)).tensor, gt, classes)


def classification(device: str, dtype: torch.dtype) -> Contest:
    torch.manual_seed(0)
    N, targets = 2, targets_of(device)
    logits = [
        (torch.randn(N, A * K, h, w, device=device) - 4).to(dtype).requires_grad_()
        for h, w in LEVELS
    ]
    R = sum(h * w * A for h, w in LEVELS)
    labels_NR = torch.full((N, R), K, device=device)
    labels_NR[targets.positive_image, targets.positive_anchor] = targets.positive_class
    labels_NR[targets.ignored_image, targets.ignored_anchor] = -1
    normalizer = max(len(targets.positive_anchor), 1)
    factor_N = torch.full((N,), 1 / normalizer, device=device)

    def finish(total: Tensor) -> tuple[Tensor, list[Tensor]]:
        grads = torch.autograd.grad(total, logits)
        return total.detach(), [grads[0], grads[-1]]

    def detectron2() -> Any:  # the lines of RetinaNet.losses
        flat = [permute_to_N_HWA_K(x, K) for x in logits]
        valid = labels_NR >= 0
        onehot = F.one_hot(labels_NR[valid], num_classes=K + 1)[:, :-1]
        total = sigmoid_focal_loss_jit(
            cat(flat, dim=1)[valid], onehot.to(dtype), alpha=0.25, gamma=2.0, reduction="sum"
        )
        return finish(total / normalizer)

    matched_NR = torch.where(labels_NR == K, -1, torch.where(labels_NR < 0, -2, labels_NR))
    classes_are_boxes = [{"labels": torch.arange(K, device=device)}] * N
    head = torchvision_retinanet.RetinaNetClassificationHead(8, A, K)

    def torchvision() -> Any:  # with its own normaliser, image by image
        flat = torch.cat([permute_to_N_HWA_K(x, K) for x in logits], dim=1)
        return finish(head.compute_loss(classes_are_boxes, {"cls_logits": flat}, list(matched_NR)))

    def ours(backend: str, in_place: bool = False) -> Callable[[], Any]:
        def run() -> Any:
            # the product stands for the head: its output is what may be overwritten
            from_head = [x * 1 for x in logits] if in_place else logits
            out = dense_classification_loss(
                from_head,
                targets,
                FocalLoss(0.25, 2.0),
                K,
                backend=backend,
                expected_grad_N=factor_N,
                in_place=in_place,
            )
            return finish((out.total * factor_N).sum())

        return run

    copies = [torch.empty_like(x) for x in logits]

    def limit() -> None:  # one read of the logits, one write of the gradient
        for x, copy in zip(logits, copies):
            copy.copy_(x.detach())

    fastest = "native" if device == "cpu" else "triton"
    contenders = {
        "detectron2": detectron2,
        "torchvision": torchvision,
        "ours, eager": ours("eager"),
        f"ours, {fastest}": ours(fastest),
        "limit": limit,
    }
    if device == "cpu" and native.unavailable():
        del contenders[f"ours, {fastest}"]

    def check(results: dict[str, Any]) -> str:
        total, grads = results["detectron2"]
        for name in contenders:
            if name.startswith("ours"):
                agree(results[name][0], total, 1e-5 if dtype == torch.float32 else 1e-2)
                for got, expected in zip(results[name][1], grads):
                    scale = expected.abs().max().double()
                    error = (got.double() - expected.double()).abs().max() / scale
                    assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
        rtol = "1e-5" if dtype == torch.float32 else "1e-2 (Detectron2 rounds to 16 bit inside)"
        return f"loss within {rtol} of Detectron2's, gradients too"

    name = f"classification, 2 x {R:,} anchors, K = {K}, {str(dtype)[6:]}"
    return Contest("loss", name, contenders, check)


def box_regression(device: str) -> Contest:
    torch.manual_seed(0)
    N, targets, anchors = 2, targets_of(device), anchors_of(device)
    deltas = [torch.randn(N, A * 4, h, w, device=device).requires_grad_() for h, w in LEVELS]
    anchors_R4 = Boxes.cat(anchors).tensor
    positive_NR = torch.zeros(N, len(anchors_R4), dtype=torch.bool, device=device)
    positive_NR[targets.positive_image, targets.positive_anchor] = True
    boxes_NR4 = anchors_R4.repeat(N, 1, 1)
    boxes_NR4[targets.positive_image, targets.positive_anchor] = targets.positive_gt_box
    box_loss = SmoothL1(beta=0.1)

    def finish(total: Tensor) -> tuple[Tensor, Any]:
        return total.detach(), torch.autograd.grad(total, deltas)

    def detectron2() -> Any:
        flat = [permute_to_N_HWA_K(x, 4) for x in deltas]
        return finish(
            _dense_box_regression_loss(
                anchors, TRANSFORM, flat, list(boxes_NR4), positive_NR, smooth_l1_beta=0.1
            )
        )

    def ours() -> Any:
        image, anchor = targets.positive_image, targets.positive_anchor
        target_P4 = TRANSFORM.get_deltas(anchors_R4[anchor], targets.positive_gt_box)
        return finish(box_loss(gather_anchors(deltas, image, anchor, 4), target_P4).sum())

    def check(results: dict[str, Any]) -> str:
        agree(results["ours"][0], results["detectron2"][0], 1e-6)
        for got, expected in zip(results["ours"][1], results["detectron2"][1]):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        return "loss within 1e-6, gradients within 1e-5"

    name = f"box, {len(targets.positive_anchor)} positives"
    return Contest("loss", name, {"detectron2": detectron2, "ours": ours}, check)


# --- matching --------------------------------------------------------------------------------


def matching(device: str) -> Iterator[Contest]:
    """One image's boxes to 201,600 anchors."""
    anchors_R4 = Boxes.cat(anchors_of(device)).tensor
    theirs = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    torchvisions = torchvision_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    mine = AnchorMatcher((0.4, 0.5), (0, -1, 1))
    for count in (1, 20, 100, 500):
        gt = boxes_in_image(count, torch.Generator().manual_seed(0), device)

        def detectron2(gt: Tensor = gt) -> Any:
            return theirs(pairwise_iou(Boxes(gt), Boxes(anchors_R4)))

        def torchvision(gt: Tensor = gt) -> Any:
            return torchvisions(box_iou(gt, anchors_R4))

        def ours(gt: Tensor = gt) -> Any:
            return mine(gt, anchors_R4)

        def check(results: dict[str, Any]) -> str:
            index, label = results["detectron2"]
            assert torch.equal(results["ours"].gt, index)
            assert torch.equal(results["ours"].label, label)
            return "labels and boxes equal to the bit"

        contenders = {"detectron2": detectron2, "torchvision": torchvision, "ours": ours}
        yield Contest("matching", f"{count} boxes, {len(anchors_R4):,} anchors", contenders, check)


# --- postprocess -----------------------------------------------------------------------------


def postprocess(device: str) -> Iterator[Contest]:
    """Threshold, top-k, decoding and NMS of one image, from the raw output of the head."""
    anchors = anchors_of(device)
    images = ImageList(torch.zeros(1, 3, *IMAGE_SIZE, device=device), [IMAGE_SIZE])
    mine = DenseInference(num_classes=K, box2box_transform=TRANSFORM)
    theirs = detectron2_postprocessor(anchors)
    torchvisions = torchvision_retinanet.RetinaNet.__new__(torchvision_retinanet.RetinaNet)
    torch.nn.Module.__init__(torchvisions)
    torchvisions.score_thresh, torchvisions.nms_thresh = 0.05, 0.5
    torchvisions.topk_candidates, torchvisions.detections_per_img = 1000, 100
    torchvisions.box_coder = torchvision_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    for mean in (-9.0, -4.55):
        generator = torch.Generator().manual_seed(0)
        logits = [torch.randn(1, A * K, h, w, generator=generator) + mean for h, w in LEVELS]
        deltas = [torch.randn(1, A * 4, h, w, generator=generator) * 0.1 for h, w in LEVELS]
        if mean == -9.0:  # a trained network is sure of its background
            for x in logits:
                some = torch.randint(x.numel(), (150,), generator=generator)
                x.view(-1)[some] = torch.randn(150, generator=generator) * 2
        count = sum(int((x.sigmoid() > 0.05).sum()) for x in logits)
        logits, deltas = [x.to(device) for x in logits], [x.to(device) for x in deltas]

        def detectron2(logits: list[Tensor] = logits, deltas: list[Tensor] = deltas) -> Any:
            return theirs.forward_inference(images, [], [logits, deltas])[0]

        def torchvision(logits: list[Tensor] = logits, deltas: list[Tensor] = deltas) -> Any:
            outputs = {
                "cls_logits": [permute_to_N_HWA_K(x, K) for x in logits],
                "bbox_regression": [permute_to_N_HWA_K(x, 4) for x in deltas],
            }
            boxes = [[a.tensor for a in anchors]]
            return torchvisions.postprocess_detections(outputs, boxes, [IMAGE_SIZE])

        def ours(logits: list[Tensor] = logits, deltas: list[Tensor] = deltas) -> Any:
            return mine(anchors, logits, deltas, [IMAGE_SIZE])[0]

        contenders = {"detectron2": detectron2, "torchvision": torchvision, "ours": ours}
        yield Contest("postprocess", f"{count:,} candidates", contenders, same_detections)


def detectron2_postprocessor(anchors: list[Boxes]) -> RetinaNet:
    """Detectron2's model without its network."""
    model = RetinaNet.__new__(RetinaNet)
    torch.nn.Module.__init__(model)
    model.num_classes, model.box2box_transform = K, TRANSFORM
    model.test_score_thresh, model.test_topk_candidates = 0.05, 1000
    model.test_nms_thresh, model.max_detections_per_image = 0.5, 100
    # it computes the sigmoid in place, of what it has permuted: a copy, so nothing is lost
    model.anchor_generator = lambda features: anchors
    return model


def same_detections(results: dict[str, Any]) -> str:
    expected: Instances = results["detectron2"]
    got: Instances = results["ours"]
    assert torch.equal(got.pred_classes, expected.pred_classes)
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)
    return "boxes, scores, classes and their order equal to the bit"
