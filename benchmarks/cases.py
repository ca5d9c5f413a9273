"""What the benchmark compares: the same work by Detectron2, torchvision and us.

Here: what a contest is, and those of matching and post-processing. The others are in
:mod:`~.contests_loss`, :mod:`~.contests_pipeline` and :mod:`~.contests_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.ops import box_iou

from retina_plugin.modeling.inference import DenseInference
from retina_plugin.modeling.matcher import AnchorMatcher

__all__ = ["PEERS", "Contest", "matching", "postprocess"]

PEERS = ("detectron2", "torchvision")

K, A = 80, 9
Levels = Sequence[tuple[int, int]]
# P3 to P7 of an image of 800 x 1344 pixels: 201,600 anchors
LEVELS: Levels = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
IMAGE_SIZE = (800, 1344)
TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


@dataclass
class Contest:
    """Contenders do the same work; the first is who the others are compared with.

    ``check`` gets everybody's result, raises AssertionError where one is wrong and returns in words
    how far they agree, and who was not compared and why. ``rounds`` bounds the rounds of what takes
    long; ``memory`` is False where torch's allocator does not see what is used. ``prepare`` makes,
    by contender, what a run uses up: before each run, neither timed nor counted as its memory.
    """

    stage: str
    name: str
    contenders: Mapping[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], str]
    rounds: int = 100
    memory: bool = True
    prepare: Mapping[str, Callable[[], None]] = field(default_factory=dict)

    def ready(self, contender: str) -> Callable[[], Any]:
        """A contender that can be run once."""
        if contender in self.prepare:
            self.prepare[contender]()
        return self.contenders[contender]

    def results(self) -> dict[str, Any]:
        """Everybody's, for ``check``."""
        return {name: self.ready(name)() for name in self.contenders}


def anchors_of(device: str, levels: Levels = LEVELS) -> list[Boxes]:
    """The paper's anchors on levels P3 to P7 of such heights and widths."""
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16, 32, 64, 128]
    )
    return generator.to(device)([torch.empty(1, 1, h, w, device=device) for h, w in levels])


def boxes_in_image(count: int, generator: torch.Generator, device: str) -> Tensor:
    """(count, 4) boxes of 10 to 400 pixels, as uneven as real ones."""
    height, width = IMAGE_SIZE
    size = 10 * 40 ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], dim=1).to(device)


def agree(got: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=0)


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
            assert torch.equal(results["ours"].label, label - 1)  # 0, -1, -2: see Matches
            # torchvision's one number: the box, or -1 for background and -2 for ignored
            coded = torch.where(label == 1, index, torch.where(label == 0, -1, -2))
            assert torch.equal(results["torchvision"], coded)
            return "labels and boxes of all three equal to the bit"

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
    """Ours and torchvision's against Detectron2's.

    With several threads torch cuts its work elsewhere for other shapes, and the sigmoid of an entry
    differs in the last bit between a vector and the rest that fills none.
    """
    one_thread = torch.get_num_threads() == 1
    rtol = 0.0 if one_thread else 1e-6
    expected: Instances = results["detectron2"]
    got: Instances = results["ours"]
    assert torch.equal(got.pred_classes, expected.pred_classes)
    agree(got.scores, expected.scores, rtol)
    agree(got.pred_boxes.tensor, expected.pred_boxes.tensor, rtol)
    (torchvision,) = results["torchvision"]
    assert torch.equal(torchvision["labels"], expected.pred_classes)
    agree(torchvision["scores"], expected.scores, 1e-6)
    clipped = expected.pred_boxes.clone()  # which torchvision does before its NMS
    clipped.clip(IMAGE_SIZE)
    torch.testing.assert_close(torchvision["boxes"], clipped.tensor, rtol=1e-5, atol=1e-3)
    ours = "equal to the bit" if one_thread else "within 1e-6 of Detectron2's (several threads)"
    return (
        f"boxes, scores, classes and their order {ours}; torchvision's within 1e-5, "
        "its boxes being clipped to the image"
    )
