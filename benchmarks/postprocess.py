"""Post-processing: threshold, top-k, decoding and NMS of one image's raw head output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.models.detection import retinanet as torchvision_retinanet

from benchmarks.case import Case
from benchmarks.inputs import IMAGE_SIZE, LEVELS, TRANSFORM, A, K, anchors_of, assert_near
from retina_plugin.modeling.inference import DenseInference

__all__ = ["postprocess"]


def postprocess(device: str) -> Iterator[Case]:
    """A trained network's hundreds of candidates, and an untrained one's hundreds of thousands."""
    anchors = anchors_of(device)
    for mean, num_confident in ((-9.0, 150), (-4.55, 0)):
        generator = torch.Generator().manual_seed(0)
        logits = [torch.randn(1, A * K, h, w, generator=generator) + mean for h, w in LEVELS]
        deltas = [torch.randn(1, A * 4, h, w, generator=generator) * 0.1 for h, w in LEVELS]
        if num_confident:
            for x in logits:
                entry = torch.randint(x.numel(), (num_confident,), generator=generator)
                x.view(-1)[entry] = torch.randn(num_confident, generator=generator) * 2
        yield _postprocess_case(
            anchors, [x.to(device) for x in logits], [x.to(device) for x in deltas]
        )


def _postprocess_case(anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor]) -> Case:
    num_candidates = sum(int((x.sigmoid() > 0.05).sum()) for x in logits)
    images = ImageList(torch.zeros(1, 3, *IMAGE_SIZE, device=logits[0].device), [IMAGE_SIZE])
    detectron2_model, torchvision_model = _detectron2_model(anchors), _torchvision_model()
    our_inference = DenseInference(num_classes=K, box2box_transform=TRANSFORM)

    def detectron2() -> Any:
        return detectron2_model.forward_inference(images, [], [logits, deltas])[0]

    def torchvision() -> Any:
        outputs = {
            "cls_logits": [permute_to_N_HWA_K(x, K) for x in logits],
            "bbox_regression": [permute_to_N_HWA_K(x, 4) for x in deltas],
        }
        boxes = [[a.tensor for a in anchors]]
        return torchvision_model.postprocess_detections(outputs, boxes, [IMAGE_SIZE])

    def ours() -> Any:
        return our_inference(anchors, logits, deltas, [IMAGE_SIZE])[0]

    implementations = {"detectron2": detectron2, "torchvision": torchvision, "ours": ours}
    return Case("postprocess", f"{num_candidates:,} candidates", implementations, _same_detections)


def _detectron2_model(anchors: list[Boxes]) -> RetinaNet:
    """Detectron2's model without its network.

    Its sigmoid is in place, on a permuted copy of the logits: ``logits`` stay as they are.
    """
    model = RetinaNet.__new__(RetinaNet)
    torch.nn.Module.__init__(model)
    model.num_classes, model.box2box_transform = K, TRANSFORM
    model.test_score_thresh, model.test_topk_candidates = 0.05, 1000
    model.test_nms_thresh, model.max_detections_per_image = 0.5, 100
    model.anchor_generator = lambda features: anchors
    return model


def _torchvision_model() -> torchvision_retinanet.RetinaNet:
    """torchvision's model without its network."""
    model = torchvision_retinanet.RetinaNet.__new__(torchvision_retinanet.RetinaNet)
    torch.nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh = 0.05, 0.5
    model.topk_candidates, model.detections_per_img = 1000, 100
    model.box_coder = torchvision_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    return model


def _same_detections(results: dict[str, Any]) -> str:
    """Check our detections and torchvision's against Detectron2's; how far they agree.

    On one thread ours are equal to the bit. On several, torch splits tensors of different shapes at
    different places, and its vectorised sigmoid differs from the scalar one, which it uses for the
    rest of a piece, in the last bit.
    """
    one_thread = torch.get_num_threads() == 1
    rtol = 0.0 if one_thread else 1e-6
    expected: Instances = results["detectron2"]
    ours: Instances = results["ours"]
    assert torch.equal(ours.pred_classes, expected.pred_classes)
    assert_near(ours.scores, expected.scores, rtol)
    assert_near(ours.pred_boxes.tensor, expected.pred_boxes.tensor, rtol)
    (torchvision,) = results["torchvision"]
    assert torch.equal(torchvision["labels"], expected.pred_classes)
    assert_near(torchvision["scores"], expected.scores, 1e-6)
    clipped = expected.pred_boxes.clone()  # torchvision clips boxes before its NMS
    clipped.clip(IMAGE_SIZE)
    torch.testing.assert_close(torchvision["boxes"], clipped.tensor, rtol=1e-5, atol=1e-3)
    exactness = (
        "equal to the bit" if one_thread else "within 1e-6 of Detectron2's (several threads)"
    )
    return (
        f"boxes, scores, classes and their order {exactness}; torchvision's within 1e-5, "
        "its boxes being clipped to the image"
    )
