"""The two losses: forward and backward from the raw output of the head."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
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

from benchmarks.case import Case
from benchmarks.inputs import (
    IMAGE_SIZE,
    LEVELS,
    TRANSFORM,
    A,
    K,
    Levels,
    anchors_of,
    assert_near,
    boxes_in_image,
)
from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    DenseTargets,
    FocalLoss,
    check_backend,
    dense_classification_loss,
)
from retina_plugin.losses.regression import SmoothL1
from retina_plugin.modeling import AnchorLabeler, AnchorMatcher
from retina_plugin.modeling.box_regression import BoxTransform, box_loss_sums

__all__ = ["loss"]

N = 2  # images


def loss(device: str, levels: Levels = LEVELS) -> Iterator[Case]:
    """The classification loss in two precisions, and the box loss."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _classification_case(device, dtype, levels)
    yield _box_case(device, levels)


def _targets(device: str, levels: Levels, num_boxes: int = 20) -> DenseTargets:
    generator = torch.Generator().manual_seed(0)
    labeler = AnchorLabeler(AnchorMatcher((0.4, 0.5), (0, -1, 1)), K)
    gt = [boxes_in_image(num_boxes, generator, device) for _ in range(N)]
    instances = [
        Instances(
            IMAGE_SIZE,
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(K, (num_boxes,), generator=generator).to(device),
        )
        for boxes in gt
    ]
    return labeler(Boxes.cat(anchors_of(device, levels)).tensor, instances)


def _classification_case(device: str, dtype: torch.dtype, levels: Levels) -> Case:
    torch.manual_seed(0)
    targets = _targets(device, levels)
    logits = [
        (torch.randn(N, A * K, h, w, device=device) - 4).to(dtype).requires_grad_()
        for h, w in levels
    ]
    R = sum(h * w * A for h, w in levels)
    normalizer = max(len(targets.positive_anchor), 1)
    factor_N = torch.full((N,), 1 / normalizer, device=device)

    def loss_and_gradients(total: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the first and the last level: the others would take gigabytes."""
        grads = torch.autograd.grad(total, inputs)
        return total.detach(), [grads[0], grads[-1]]

    # Detectron2's labels: K for background, -1 for ignored
    labels_NR = torch.full((N, R), K, device=device)
    labels_NR[targets.positive_image, targets.positive_anchor] = targets.positive_class
    labels_NR[targets.ignored_image, targets.ignored_anchor] = -1

    def detectron2() -> Any:  # the lines of RetinaNet.losses
        flat = [permute_to_N_HWA_K(x, K) for x in logits]
        valid = labels_NR >= 0
        onehot = F.one_hot(labels_NR[valid], num_classes=K + 1)[:, :-1]
        total = sigmoid_focal_loss_jit(
            cat(flat, dim=1)[valid], onehot.to(dtype), alpha=0.25, gamma=2.0, reduction="sum"
        )
        return loss_and_gradients(total / normalizer, logits)

    # torchvision's labels are indices of boxes, -1 for background, -2 for ignored. With one box a
    # class, the index is the class.
    matched_NR = torch.where(labels_NR == K, -1, torch.where(labels_NR < 0, -2, labels_NR))
    one_box_a_class = [{"labels": torch.arange(K, device=device)}]
    head = torchvision_retinanet.RetinaNetClassificationHead(8, A, K)
    positives_N = targets.num_positives_N().clamp(min=1)

    def torchvision() -> Any:
        # it divides by each image's positives: multiply, so that all divide by the same number
        flat = torch.cat([permute_to_N_HWA_K(x, K) for x in logits], dim=1)
        total = sum(
            head.compute_loss(one_box_a_class, {"cls_logits": [x]}, [matched]) * positives
            for x, matched, positives in zip(flat, matched_NR, positives_N)
        )
        return loss_and_gradients(total / normalizer, logits)

    def ours(backend: str, inputs: list[Tensor], in_place: bool = False) -> Callable[[], Any]:
        def run() -> Any:
            out = dense_classification_loss(
                inputs,
                targets,
                FocalLoss(0.25, 2.0),
                K,
                backend=backend,
                expected_grad_N=factor_N,
                in_place=in_place,
            )
            return loss_and_gradients((out.total * factor_N).sum(), inputs)

        return run

    copies = [torch.empty_like(x) for x in logits]

    def limit() -> None:  # one read of the logits, one write of the gradient
        for x, copy in zip(logits, copies):
            copy.copy_(x.detach())

    overwritten: list[Tensor] = []

    def copy_logits() -> None:  # a run in place overwrites them; autograd forbids it for leaves
        overwritten[:] = [x.clone() for x in logits]

    implementations = {
        "detectron2": detectron2,
        "torchvision": torchvision,
        "ours, eager": ours("eager", logits),
    }
    prepare = {}
    kernel = "native" if device == "cpu" else "triton"
    try:
        check_backend(kernel)
    except ConfigError as error:
        print(f"left out of the benchmark: {error}", file=sys.stderr)
    else:
        in_place = f"ours, {kernel} in place"
        implementations[f"ours, {kernel}"] = ours(kernel, logits)
        implementations[in_place] = ours(kernel, overwritten, in_place=True)
        prepare[in_place] = copy_logits
    implementations["limit"] = limit
    name = f"classification, {N} x {R:,} anchors, K = {K}, {str(dtype)[6:]}"
    check = functools.partial(_same_loss, dtype)
    return Case("loss", name, implementations, check, prepare=prepare)


def _same_loss(dtype: torch.dtype, results: dict[str, Any]) -> str:
    """Losses, and gradients of the first and the last level, against Detectron2's.

    For 16-bit logits Detectron2 and ours compute in float32. torchvision computes in 16 bit, where
    1 - p_t of a small p is lost to rounding: its tolerance is 1 % of the loss and of the largest
    gradient.
    """
    total, grads = results["detectron2"]
    is_16_bit = dtype != torch.float32
    for name, result in results.items():
        if name == "limit":
            continue
        tolerance = 1e-2 if is_16_bit and name == "torchvision" else 1e-5
        assert_near(result[0], total, tolerance)
        for actual, expected in zip(result[1], grads):
            # neighbouring values of bfloat16 are up to 2 ** -7 apart
            rtol = 2**-7 if is_16_bit else 0.0
            atol = tolerance * expected.abs().max().item()
            # assert_close would take seconds and gigabytes for so many values
            bound = expected.float().abs().mul_(rtol).add_(atol)
            assert bool(((actual.float() - expected.float()).abs_() <= bound).all()), name
    if is_16_bit:
        return (
            "loss within 1e-5 of Detectron2's, gradients within one step of bfloat16; "
            "torchvision's, which computes in 16 bit, within 1e-2"
        )
    return "loss within 1e-5 of Detectron2's, gradients within 1e-5 of the largest"


def _box_case(device: str, levels: Levels) -> Case:
    torch.manual_seed(0)
    targets, anchors = _targets(device, levels), anchors_of(device, levels)
    deltas = [torch.randn(N, A * 4, h, w, device=device).requires_grad_() for h, w in levels]
    anchors_R4 = Boxes.cat(anchors).tensor
    positive_NR = torch.zeros(N, len(anchors_R4), dtype=torch.bool, device=device)
    positive_NR[targets.positive_image, targets.positive_anchor] = True
    boxes_NR4 = anchors_R4.repeat(N, 1, 1)
    boxes_NR4[targets.positive_image, targets.positive_anchor] = targets.positive_gt_box
    box_loss, transform = SmoothL1(beta=0.1), BoxTransform(TRANSFORM.weights)

    def loss_and_gradients(total: Tensor) -> tuple[Tensor, Any]:
        return total.detach(), torch.autograd.grad(total, deltas)

    def detectron2() -> Any:
        flat = [permute_to_N_HWA_K(x, 4) for x in deltas]
        return loss_and_gradients(
            _dense_box_regression_loss(
                anchors, TRANSFORM, flat, list(boxes_NR4), positive_NR, smooth_l1_beta=0.1
            )
        )

    def ours() -> Any:
        uncached = dataclasses.replace(targets)  # targets keep the list of positives once made
        total = box_loss_sums(box_loss, transform, anchors_R4, deltas, uncached).sum()
        return loss_and_gradients(total)

    def check(results: dict[str, Any]) -> str:
        assert_near(results["ours"][0], results["detectron2"][0], 1e-6)
        for actual, expected in zip(results["ours"][1], results["detectron2"][1]):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        return "loss within 1e-6, gradients within 1e-5"

    name = f"box, {len(targets.positive_anchor)} positives"
    return Case("loss", name, {"detectron2": detectron2, "ours": ours}, check)
