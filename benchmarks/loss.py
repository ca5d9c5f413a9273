"""The benchmark's contests of the two losses: forward and backward from the head's raw output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import cat
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor
from torchvision.models.detection import retinanet as torchvision_retinanet

from benchmarks.cases import (
    IMAGE_SIZE,
    LEVELS,
    TRANSFORM,
    A,
    Contest,
    K,
    Levels,
    agree,
    anchors_of,
    boxes_in_image,
)
from retina_plugin.losses import DenseTargets, FocalLoss, dense_classification_loss
from retina_plugin.losses.backends import native
from retina_plugin.losses.regression import SmoothL1
from retina_plugin.modeling.box_regression import BoxTransform, box_loss_sums
from retina_plugin.modeling.labeling import AnchorLabeler
from retina_plugin.modeling.matcher import AnchorMatcher

__all__ = ["loss"]


def loss(device: str, levels: Levels = LEVELS) -> Iterator[Contest]:
    """Forward and backward of both losses from the raw output of the head."""
    for dtype in (torch.float32, torch.bfloat16):
        yield classification(device, dtype, levels)
    yield box_regression(device, levels)


def targets_of(device: str, levels: Levels, num_images: int = 2, boxes: int = 20) -> DenseTargets:
    generator = torch.Generator().manual_seed(0)
    labeler = AnchorLabeler(AnchorMatcher((0.4, 0.5), (0, -1, 1)), K)
    gt = [boxes_in_image(boxes, generator, device) for _ in range(num_images)]
    instances = [
        Instances(
            IMAGE_SIZE,
            gt_boxes=Boxes(x),
            gt_classes=torch.randint(K, (boxes,), generator=generator).to(device),
        )
        for x in gt
    ]
    return labeler(Boxes.cat(anchors_of(device, levels)).tensor, instances)


def classification(device: str, dtype: torch.dtype, levels: Levels) -> Contest:
    torch.manual_seed(0)
    N, targets = 2, targets_of(device, levels)
    logits = [
        (torch.randn(N, A * K, h, w, device=device) - 4).to(dtype).requires_grad_()
        for h, w in levels
    ]
    R = sum(h * w * A for h, w in levels)
    labels_NR = torch.full((N, R), K, device=device)
    labels_NR[targets.positive_image, targets.positive_anchor] = targets.positive_class
    labels_NR[targets.ignored_image, targets.ignored_anchor] = -1
    normalizer = max(len(targets.positive_anchor), 1)
    factor_N = torch.full((N,), 1 / normalizer, device=device)

    def finish(total: Tensor, inputs: list[Tensor] = logits) -> tuple[Tensor, list[Tensor]]:
        grads = torch.autograd.grad(total, inputs)
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
    classes_are_boxes = [{"labels": torch.arange(K, device=device)}]
    head = torchvision_retinanet.RetinaNetClassificationHead(8, A, K)

    positives_N = targets.num_positives_N().clamp(min=1)

    def torchvision() -> Any:
        # it divides image by image; its divisor is taken out again, so that all sum the same
        flat = torch.cat([permute_to_N_HWA_K(x, K) for x in logits], dim=1)
        total = sum(
            head.compute_loss(classes_are_boxes, {"cls_logits": [x]}, [matched]) * positives
            for x, matched, positives in zip(flat, matched_NR, positives_N)
        )
        return finish(total / normalizer)

    def ours(backend: str, from_head: list[Tensor], in_place: bool = False) -> Callable[[], Any]:
        def run() -> Any:
            out = dense_classification_loss(
                from_head,
                targets,
                FocalLoss(0.25, 2.0),
                K,
                backend=backend,
                expected_grad_N=factor_N,
                in_place=in_place,
            )
            return finish((out.total * factor_N).sum(), from_head)

        return run

    copies = [torch.empty_like(x) for x in logits]

    def limit() -> None:  # one read of the logits, one write of the gradient
        for x, copy in zip(logits, copies):
            copy.copy_(x.detach())

    overwritten: list[Tensor] = []

    def head_output() -> None:  # no leaves, and new ones for each run
        overwritten[:] = [x.clone() for x in logits]

    fastest = "native" if device == "cpu" else "triton"
    contenders = {
        "detectron2": detectron2,
        "torchvision": torchvision,
        "ours, eager": ours("eager", logits),
        f"ours, {fastest}": ours(fastest, logits),
        f"ours, {fastest} in place": ours(fastest, overwritten, in_place=True),
        "limit": limit,
    }
    prepare = {f"ours, {fastest} in place": head_output}
    if device == "cpu" and native.unavailable():
        for name in [name for name in contenders if "native" in name]:
            del contenders[name]
    name = f"classification, 2 x {R:,} anchors, K = {K}, {str(dtype)[6:]}"
    return Contest("loss", name, contenders, functools.partial(same_loss, dtype), prepare=prepare)


def same_loss(dtype: torch.dtype, results: dict[str, Any]) -> str:
    """Losses and gradients of the first and the last level against Detectron2's.

    Detectron2's arithmetic is float32 for 16-bit logits too, as ours; torchvision's is 16 bit then,
    where 1 - p_t of small p is rounding: it is held to 1 % of the loss and of the largest gradient.
    """
    total, grads = results["detectron2"]
    half = dtype != torch.float32
    for name, result in results.items():
        if name == "limit":
            continue
        coarse = half and name == "torchvision"
        agree(result[0], total, 1e-2 if coarse else 1e-5)
        for got, expected in zip(result[1], grads):
            largest = expected.abs().max().item()
            # two values of bfloat16 side by side are up to 2 ** -7 apart
            rtol = 2**-7 if half else 0.0
            atol = (1e-2 if coarse else 1e-5) * largest
            # not assert_close, which takes seconds and gigabytes for so many
            bound = expected.float().abs().mul_(rtol).add_(atol)
            assert bool(((got.float() - expected.float()).abs_() <= bound).all()), name
    if half:
        return (
            "loss within 1e-5 of Detectron2's, gradients within one step of bfloat16; "
            "torchvision's, which computes in 16 bit, within 1e-2"
        )
    return "loss within 1e-5 of Detectron2's, gradients within 1e-5 of the largest"


def box_regression(device: str, levels: Levels) -> Contest:
    torch.manual_seed(0)
    N, targets, anchors = 2, targets_of(device, levels), anchors_of(device, levels)
    deltas = [torch.randn(N, A * 4, h, w, device=device).requires_grad_() for h, w in levels]
    anchors_R4 = Boxes.cat(anchors).tensor
    positive_NR = torch.zeros(N, len(anchors_R4), dtype=torch.bool, device=device)
    positive_NR[targets.positive_image, targets.positive_anchor] = True
    boxes_NR4 = anchors_R4.repeat(N, 1, 1)
    boxes_NR4[targets.positive_image, targets.positive_anchor] = targets.positive_gt_box
    box_loss, transform = SmoothL1(beta=0.1), BoxTransform(TRANSFORM.weights)

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
        fresh = dataclasses.replace(targets)  # which has not yet looked for its positives
        return finish(box_loss_sums(box_loss, transform, anchors_R4, deltas, fresh).sum())

    def check(results: dict[str, Any]) -> str:
        agree(results["ours"][0], results["detectron2"][0], 1e-6)
        for got, expected in zip(results["ours"][1], results["detectron2"][1]):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        return "loss within 1e-6, gradients within 1e-5"

    name = f"box, {len(targets.positive_anchor)} positives"
    return Contest("loss", name, {"detectron2": detectron2, "ours": ours}, check)
