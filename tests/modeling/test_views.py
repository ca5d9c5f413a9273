"""Test-time augmentation: what a view, its mirror image and their merge must give."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from retina_plugin.data.views import build_resizes, build_test_mapper
from retina_plugin.engine import Trainer
from retina_plugin.engine.performance import build_detector
from retina_plugin.modeling import RetinaNetWithTTA


class Blobs(nn.Module):
    """Detects the bright rectangle of a black image; its class is 1 if it is higher than wide."""

    def __init__(self, min_size=0):
        super().__init__()
        self.min_size, self.batches = min_size, []

    def forward(self, inputs):
        self.batches.append([tuple(x["image"].shape[1:]) for x in inputs])
        return [{"instances": self._detect(x)} for x in inputs]

    def _detect(self, x):
        pixels = x["image"].amax(dim=0)
        rows, columns = (torch.where(pixels.amax(dim=d) > 100)[0] for d in (1, 0))
        found = Instances((x["height"], x["width"]))
        boxes = torch.zeros(0, 4)
        if len(rows) and min(pixels.shape) >= self.min_size:
            sides = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            scale = [x["width"] / pixels.shape[1], x["height"] / pixels.shape[0]] * 2
            boxes = torch.tensor([[float(a) * s for a, s in zip(sides, scale)]])
        found.pred_boxes, found.scores = Boxes(boxes), torch.full((len(boxes),), 0.8)
        tall = boxes[:, 3] - boxes[:, 1] > boxes[:, 2] - boxes[:, 0]
        found.pred_classes = tall.to(torch.int64)
        return found


def image(box=(10, 20, 40, 70), size=(80, 120)):
    x1, y1, x2, y2 = box
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    pixels[:, y1:y2, x1:x2] = 255
    return {"image": pixels}


def views(cfg, model, sizes, flip=False, merge="wbf"):
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = True, sizes
    cfg.TEST.AUG.FLIP, cfg.TEST.AUG.MERGE = flip, merge
    return RetinaNetWithTTA.build(cfg, model, build_resizes(cfg)).eval()


def detections(instances):
    return [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]


@pytest.fixture
def model(tiny_cfg):
    """A detector with random weights that detects dozens of boxes."""
    torch.manual_seed(0)
    tiny_cfg.MODEL.RETINANET.PRIOR_PROB = 0.3
    return Trainer.build_model(tiny_cfg).eval()


@pytest.fixture
def records(tiny_cfg):
    tiny_cfg.TEST.AUG.ENABLED = True
    loader = Trainer.build_test_loader(tiny_cfg, "digits_scenes_val")
    return [record for batch in loader for record in batch]


@pytest.mark.parametrize("merge", ["nms", "soft_nms", "class_agnostic", "wbf"])
@pytest.mark.parametrize("size", [48, 64, 96])
def test_one_view_gives_the_detections_of_the_model_to_the_bit(
    tiny_cfg, model, records, size, merge
):
    got = views(tiny_cfg, model, (size,), merge=merge)(records)
    tiny_cfg.TEST.AUG.ENABLED, tiny_cfg.INPUT.MIN_SIZE_TEST = False, size
    mapper = build_test_mapper(tiny_cfg)
    plain = [mapper({k: v for k, v in record.items() if k != "image"}) for record in records]
    assert all(min(x["image"].shape[1:]) == size for x in plain)
    with torch.no_grad():
        expected = model(plain)
    for x, y in zip(got, expected):
        assert len(y["instances"]) > 20
        assert x["instances"].image_size == y["instances"].image_size
        for a, b in zip(detections(x["instances"]), detections(y["instances"])):
            assert torch.equal(a, b)


@pytest.mark.parametrize("merge", ["nms", "wbf"])
def test_all_views_of_an_object_are_in_the_frame_of_the_image(tiny_cfg, merge):
    """Scaled and mirrored back: one box, of all views, where the object is."""
    detector = Blobs()
    x = image(box=(10, 20, 40, 70))
    (got,) = views(tiny_cfg, detector, (40, 80, 160), flip=True, merge=merge)([x])
    boxes, scores, classes = detections(got["instances"])
    assert torch.allclose(boxes, torch.tensor([[10.0, 20, 40, 70]]), atol=1.5)
    assert scores.item() == pytest.approx(0.8) and classes.tolist() == [1]
    assert detector.batches == [[(40, 60)] * 2, [(80, 120)] * 2, [(160, 240)] * 2]


def test_boxes_are_in_the_frame_that_is_asked_for(tiny_cfg):
    x = {**image(box=(10, 20, 40, 70)), "height": 160, "width": 360}
    (got,) = views(tiny_cfg, Blobs(), (80,), flip=True)([x])
    assert got["instances"].image_size == (160, 360)
    assert torch.allclose(detections(got["instances"])[0], torch.tensor([[30.0, 40, 120, 140]]))


def test_mirrored_image_gives_mirrored_detections(tiny_cfg, model, records):
    """With flip, both images have the same two views."""
    detector = views(tiny_cfg, model, (64, 80), flip=True, merge="nms")
    for record in records[:2]:
        mirrored = {**record, "image": record["image"].flip(-1)}
        (a,), (b,) = detector([record]), detector([mirrored])
        a, b = detections(a["instances"]), detections(b["instances"])
        width = record["image"].shape[-1]
        x1, y1, x2, y2 = b[0].unbind(1)
        back = torch.stack((width - x2, y1, width - x1, y2), dim=1)
        assert len(back) > 20
        assert torch.allclose(back, a[0], atol=1e-3) and torch.allclose(b[1], a[1], atol=1e-5)
        assert torch.equal(b[2], a[2])


def test_images_of_a_batch_do_not_see_each_other(tiny_cfg):
    """Images of one size make a batch, and each gets its own detections."""
    detector = Blobs()
    images = [image((5, 5, 30, 60)), image((50, 10, 110, 40), (60, 150)), image((60, 30, 90, 75))]
    tta = views(tiny_cfg, detector, (60, 80), flip=True)
    together = tta(images)
    assert sorted(map(len, detector.batches)) == [2, 2, 4, 4]
    for x, got in zip(images, together):
        (alone,) = tta([x])
        for a, b in zip(detections(got["instances"]), detections(alone["instances"])):
            assert torch.equal(a, b) and len(a) == 1


def test_view_that_finds_nothing_lowers_the_score_and_no_view_gives_no_detections(tiny_cfg):
    (got,) = views(tiny_cfg, Blobs(min_size=60), (40, 80))([image()])
    assert got["instances"].scores.tolist() == pytest.approx([0.4])
    (got,) = views(tiny_cfg, Blobs(min_size=999), (40, 80), flip=True)([image()])
    assert [tuple(x.shape) for x in detections(got["instances"])] == [(0, 4), (0,), (0,)]
    assert got["instances"].pred_classes.dtype == torch.int64
    assert views(tiny_cfg, Blobs(), (40,))([]) == []


def test_no_more_detections_than_asked_for(tiny_cfg, model, records):
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 7
    (got,) = views(tiny_cfg, model, (64, 80))(records[:1])
    scores = got["instances"].scores
    assert len(scores) == 7 and torch.equal(scores, scores.sort(descending=True).values)


@pytest.mark.parametrize("evaluator", ["FastCOCOEvaluator", "COCOEvaluator"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_detects_in_the_views(tiny_cfg, model, records, evaluator, precision):
    """From the config alone: the numbers are those of the views' own detections."""
    tiny_cfg.TEST.AUG.MIN_SIZES, tiny_cfg.TEST.AUG.FLIP = (48, 64), False
    tiny_cfg.TEST.EVALUATORS, tiny_cfg.TEST.PRECISION = (evaluator,), precision
    seen = []
    evaluators = Trainer.build_evaluator(tiny_cfg, "digits_scenes_val")
    process = evaluators.process
    evaluators.process = lambda x, y: (seen.extend(y), process(x, y))
    results = Trainer.test(tiny_cfg, model, [evaluators])
    assert "AP" in results["bbox"]
    expected = build_detector(tiny_cfg, model).eval()
    for record, got in zip(records, seen):
        (own,) = expected([record])
        assert record["image"].shape[1:] == got["instances"].image_size  # the original size
        for a, b in zip(detections(got["instances"]), detections(own["instances"])):
            assert torch.equal(a, b)
    assert len(seen) == len(records) == 4
