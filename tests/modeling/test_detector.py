"""FocalRetinaNet is a drop-in for Detectron2's RetinaNet."""

import copy

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses import BOX_LOSS_REGISTRY
from retina_plugin.modeling import AnchorMatcher

HEIGHT, WIDTH = 96, 128


def detectron2_cfg(meta_architecture, norm="", depth=18):
    """A RetinaNet YAML of Detectron2, with a small backbone; one line changed."""
    cfg = add_retina_config(get_cfg())
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth == 18:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RETINANET.NORM = norm
    return cfg


@pytest.fixture(scope="module")
def pair():
    """(ours, Detectron2's) with the same weights, large enough to give detections."""
    torch.manual_seed(0)
    ours = build_model(detectron2_cfg("FocalRetinaNet")).eval()
    with torch.no_grad():
        images = ours.preprocess_image([{"image": image(0)}])
        features = [ours.backbone(images.tensor)[f] for f in ours.head_in_features]
        logits, deltas = ours.head(features)
        ours.head.cls_score.bias.fill_(-4.0)
        ours.head.cls_score.weight *= 2.0 / logits[0].std()
        ours.head.bbox_pred.weight *= 0.3 / deltas[0].std()
    theirs = build_model(detectron2_cfg("RetinaNet"))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def image(seed, height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator).float()


def record(seed, boxes, classes):
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {"image": image(seed), "instances": instances, "height": HEIGHT, "width": WIDTH}


MANY = [[x, y, x + 28, y + 34] for x in (2, 40, 80) for y in (3, 50)] + [[5, 5, 120, 90]]
# IoU with the anchors between .4 and .5 (ignored ones) occurs with these odd boxes
BATCHES = {
    "many gt": [record(1, MANY, [0, 1, 2, 40, 79, 79, 5]), record(2, MANY[:4], [3, 3, 3, 3])],
    "one gt": [record(3, [[10, 12, 60, 75]], [7])],
    "one gt and none": [record(4, [[10, 12, 60, 75]], [7]), record(5, [], [])],
    "none": [record(6, [], []), record(7, [], [])],
}


def losses_and_gradients(model, batch):
    model.zero_grad()
    model.train()
    with EventStorage() as storage:
        losses = model(copy.deepcopy(batch))
        sum(losses.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses, grads, {k: v[0] for k, v in storage.latest().items()}


def reset_average(pair):
    ours, theirs = pair
    ours.normalizer.ema.fill_(100)
    theirs.loss_normalizer = 100


@pytest.mark.parametrize("norm, depth", [("", 18), ("GN", 18), ("BN", 18), ("", 50)])
def test_state_dict_is_detectron2s(norm, depth):
    ours = build_model(detectron2_cfg("FocalRetinaNet", norm, depth))
    theirs = build_model(detectron2_cfg("RetinaNet", norm, depth))
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_losses_and_gradients_are_detectron2s(pair, batch):
    reset_average(pair)
    (ours, grads, scalars), (theirs, expected, their_scalars) = (
        losses_and_gradients(model, batch) for model in pair
    )
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        # relative to the largest entry: small ones are sums in another order
        scale = grad.abs().max().item()
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * scale + 1e-12)
    assert scalars["num_pos_anchors"] == their_scalars["num_pos_anchors"]


@pytest.mark.parametrize("name", ["none", "one gt and none"])
def test_lowest_interval_may_be_ignored(pair, monkeypatch, name):
    """Also then all anchors of an image without objects are background, as in Detectron2."""
    thresholds, labels = [0.1, 0.4, 0.5], [-1, 0, -1, 1]
    monkeypatch.setattr(pair[0].labeler, "matcher", AnchorMatcher(thresholds, labels))
    theirs = Matcher(thresholds, labels, allow_low_quality_matches=True)
    monkeypatch.setattr(pair[1], "anchor_matcher", theirs)
    reset_average(pair)
    (ours, grads, _), (theirs, expected, _) = (
        losses_and_gradients(model, BATCHES[name]) for model in pair
    )
    assert ours["loss_cls"] > 0
    for key, loss in theirs.items():
        torch.testing.assert_close(ours[key], loss, rtol=1e-5, atol=0)
    key = "head.cls_score.bias"
    torch.testing.assert_close(grads[key], expected[key], rtol=1e-4, atol=1e-9)


def test_batches_have_positives_and_ignored_anchors(pair):
    """What the comparison above relies on."""
    ours = pair[0]
    batch = BATCHES["many gt"]
    images = ours.preprocess_image(batch)
    features = [ours.backbone(images.tensor)[f] for f in ours.head_in_features]
    targets = ours.labeler(
        Boxes.cat(ours.anchor_generator(features)).tensor, [x["instances"] for x in batch]
    )
    assert len(targets.positive_anchor) > 20 and len(targets.ignored_anchor) > 10
    assert len(targets.positive_class.unique()) >= 5


def test_autocast_changes_losses_and_gradients_by_its_rounding_only(pair):
    reset_average(pair)
    losses, grads, _ = losses_and_gradients(pair[0], BATCHES["many gt"])
    reset_average(pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_grads, _ = losses_and_gradients(pair[0], BATCHES["many gt"])
    for name, loss in losses.items():
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], loss, rtol=0.03, atol=0)
    for name in ("head.cls_score.weight", "head.bbox_pred.weight"):
        similarity = torch.cosine_similarity(grads[name].flatten(), mixed_grads[name].flatten(), 0)
        assert similarity > 0.98, name


@pytest.mark.parametrize("name", ["giou", "diou", "ciou", "smooth_l1"])
def test_every_box_loss_is_detectron2s(pair, name, monkeypatch):
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = name
    monkeypatch.setattr(pair[0], "box_loss", BOX_LOSS_REGISTRY.build(cfg))
    monkeypatch.setattr(pair[1], "box_reg_loss_type", name)
    reset_average(pair)
    (ours, grads, _), (theirs, expected, _) = (
        losses_and_gradients(model, BATCHES["many gt"]) for model in pair
    )
    torch.testing.assert_close(ours["loss_box_reg"], theirs["loss_box_reg"], rtol=1e-5, atol=0)
    grad, their = grads["head.bbox_pred.weight"], expected["head.bbox_pred.weight"]
    torch.testing.assert_close(grad, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


def test_moving_average_is_detectron2s(pair):
    reset_average(pair)
    for batch in (BATCHES["many gt"], BATCHES["none"], BATCHES["one gt"]):
        (ours, _, _), (theirs, _, _) = (losses_and_gradients(m, batch) for m in pair)
        torch.testing.assert_close(ours["loss_cls"], theirs["loss_cls"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        pair[0].normalizer.ema.item(), pair[1].loss_normalizer, rtol=1e-6, atol=0
    )


def with_boxes_outside(model, treatment):
    """The same model with another ``BOXES_OUTSIDE_TEST``."""
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.BOXES_OUTSIDE_TEST = treatment
    other = build_model(cfg).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_detections_are_detectron2s(pair):
    """Boxes, scores, classes and order, with another output size than the network's.

    In a batch of different sizes, with ``BOXES_OUTSIDE_TEST: keep``.
    """
    models = (with_boxes_outside(pair[0], "keep"), pair[1])
    batch = [
        {"image": image(8), "height": 192, "width": 256},
        {"image": image(9, 70, 111), "height": 70, "width": 111},
    ]
    outputs = []
    for model in models:
        model.eval()
        with torch.no_grad():
            outputs.append(model(copy.deepcopy(batch)))
    for ours, theirs in zip(*outputs):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(theirs) > 20 and len(theirs.pred_classes.unique()) > 5
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert ours.image_size == theirs.image_size


def detect(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(copy.deepcopy(batch))]


def test_detections_of_an_image_begin_with_detectron2s(pair):
    """By default, of an image alone; the boxes of Detectron2 outside the image are replaced."""
    batch = [{"image": image(9, 70, 111), "height": 140, "width": 222}]
    (ours,), (theirs,) = (detect(model, batch) for model in pair)
    assert len(theirs) < len(ours) == 100
    assert torch.equal(ours.pred_boxes.tensor[: len(theirs)], theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores[: len(theirs)], theirs.scores)
    assert torch.equal(ours.pred_classes[: len(theirs)], theirs.pred_classes)


def test_a_small_image_keeps_its_detections_in_a_batch(pair):
    """As many as alone. (Not the same ones: the convs see the padding, so the features differ.)"""
    drop, keep = (with_boxes_outside(pair[0], treatment) for treatment in ("drop", "keep"))
    small = {"image": image(1, 100, 90)}  # padded to 128 x 96 alone
    batch = [small, {"image": image(2, 224, 320)}]

    def be_confident_in_the_padding(head, inputs, output):
        for x, stride in zip(output[0], (8, 16, 32, 64, 128)):
            if len(x) == 2:
                x[0, :, -(-128 // stride) :] += 8
                x[0, :, :, -(-96 // stride) :] += 8

    for model in (drop, keep):
        model.head.register_forward_hook(be_confident_in_the_padding)
    (alone,), (got, _), (kept, _) = detect(drop, [small]), detect(drop, batch), detect(keep, batch)
    assert len(got) == len(alone) == 100
    assert len(kept) < 50


def test_clipped_boxes_without_area_survive_the_postprocessing(pair):
    """As in torchvision; the other treatments give boxes with an area only."""
    batch = [{"image": image(9, 70, 111), "height": 140, "width": 222}, {"image": image(2)}]
    for treatment, has_empty in (("clip", True), ("drop", False), ("keep", False)):
        (got, _) = detect(with_boxes_outside(pair[0], treatment), batch)
        assert got.image_size == (140, 222)
        assert bool((got.pred_boxes.area() == 0).any()) == has_empty
        box = got.pred_boxes.tensor
        assert (box >= 0).all() and (box <= torch.tensor([222, 140, 222, 140])).all()
        assert (box[:, 2] > 111).any()  # in the frame of the output


def test_keys_of_inference_have_an_effect(pair):
    ours = pair[0].eval()
    batch = [{"image": image(8)}]

    def detect_with(**changes):
        inference = copy.copy(ours.inference)
        vars(inference).update(changes)
        original, ours.inference = ours.inference, inference
        with torch.no_grad():
            result = ours(batch)[0]["instances"]
        ours.inference = original
        return result

    all_of_them = detect_with(max_detections=10_000)
    assert len(detect_with(max_detections=7)) == 7
    assert (detect_with(score_thresh=0.9).scores > 0.9).all()
    assert len(detect_with(score_thresh=1.0)) == 0
    assert len(detect_with(topk_candidates=3, max_detections=10_000)) <= 3 * 5
    assert len(detect_with(nms_thresh=1.0, max_detections=10_000)) > len(all_of_them)


def test_box_loss_without_objects_is_zero_and_has_a_gradient(pair):
    losses, grads, scalars = losses_and_gradients(pair[0], BATCHES["none"])
    assert losses["loss_box_reg"].item() == 0.0 and losses["loss_cls"].item() > 0
    assert not grads["head.bbox_pred.weight"].any()  # zeros, not None: DDP needs every gradient
    assert grads["head.cls_score.weight"].any()
    assert scalars["num_pos_anchors"] == 0


def test_scalars_add_up(pair):
    losses, _, scalars = losses_and_gradients(pair[0], BATCHES["many gt"])
    parts = scalars["retinanet/cls_foreground"] + scalars["retinanet/cls_background"]
    torch.testing.assert_close(parts, losses["loss_cls"].item(), rtol=1e-5, atol=0)
    levels = [scalars[f"retinanet/num_pos_p{level}"] for level in range(3, 8)]
    torch.testing.assert_close(sum(levels), scalars["num_pos_anchors"])
    assert sum(level > 0 for level in levels) >= 2
    torch.testing.assert_close(
        scalars["retinanet/normalizer"], pair[0].normalizer.ema.item(), rtol=1e-6, atol=0
    )


def test_ohem_divides_by_the_number_of_sampled_anchors(pair):
    """If it takes all anchors, the loss is the dense sum divided by their number."""
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.NORMALIZER = "per_image"
    cfg.MODEL.RETINANET.SAMPLER = "OHEM"
    cfg.MODEL.RETINANET.OHEM.BATCH_SIZE = 10**6
    cfg.MODEL.RETINANET.OHEM.NMS_THRESH = 1.0
    ohem = build_model(cfg)
    ohem.load_state_dict(pair[0].state_dict())
    batch = BATCHES["one gt"]
    losses, grads, scalars = losses_and_gradients(ohem, batch)
    reset_average(pair)
    dense, dense_grads, dense_scalars = losses_and_gradients(pair[0], batch)

    num_anchors = sum(-(-HEIGHT // s) * -(-WIDTH // s) for s in (8, 16, 32, 64, 128)) * 9
    assert num_anchors - 100 < scalars["retinanet/normalizer"] < num_anchors  # some are ignored
    ratio = dense_scalars["retinanet/normalizer"] / scalars["retinanet/normalizer"]
    torch.testing.assert_close(losses["loss_cls"], dense["loss_cls"] * ratio, rtol=1e-5, atol=0)
    name = "head.cls_score.weight"
    torch.testing.assert_close(grads[name], dense_grads[name] * ratio, rtol=1e-4, atol=1e-9)

    ohem.sampler.batch_size = 16
    _, _, scalars = losses_and_gradients(ohem, batch)
    assert scalars["retinanet/normalizer"] == 16


def test_printed_model_names_its_losses(pair):
    text = repr(pair[0])
    assert "cls_loss=FocalLoss(alpha=0.25, gamma=2.0), box_loss=SmoothL1(beta=0.0)" in text
    assert "(normalizer): LossNormalizer(ema)" in text


@pytest.mark.parametrize("pi, per_entry", [(0.01, 0.01005), (0.5, 0.69315)])
def test_first_loss_follows_from_the_prior(pi, per_entry):
    """Section 3.3: CE of a background entry is -log(1 - pi) at the start."""
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.PRIOR_PROB = pi
    cfg.MODEL.RETINANET.CLS_LOSS = "CrossEntropy"
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA = None
    cfg.MODEL.RETINANET.NORMALIZER = "per_image"
    losses, _, _ = losses_and_gradients(build_model(cfg), BATCHES["none"])
    entries = sum(-(-HEIGHT // s) * -(-WIDTH // s) for s in (8, 16, 32, 64, 128)) * 9 * 80
    assert losses["loss_cls"].item() / entries == pytest.approx(per_entry, rel=0.02)


def test_per_image_normaliser_is_the_papers(pair):
    """The mean over images of each image's sum over its own positives."""
    ours = pair[0]
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.NORMALIZER = "per_image"
    paper = build_model(cfg)
    paper.load_state_dict(ours.state_dict())
    batch = BATCHES["many gt"]
    together, _, _ = losses_and_gradients(paper, batch)
    alone = [losses_and_gradients(paper, [x])[0] for x in batch]
    for name in together:
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(together[name], mean, rtol=1e-5, atol=0)


def test_crowds_are_no_objects_and_may_be_ignored(pair, monkeypatch):
    """Without the threshold a crowd changes nothing; with it fewer anchors are background."""
    ours, _ = pair
    reset_average(pair)
    boxes, classes = MANY[:2], [3, 4]
    _, _, without = losses_and_gradients(ours, [record(1, boxes, classes)])
    crowd = record(1, [*boxes, [64, 48, 127, 95]], [*classes, 5])
    crowd["instances"].gt_iscrowd = torch.tensor([False, False, True])

    reset_average(pair)
    _, _, unused = losses_and_gradients(ours, [crowd])
    assert unused == without

    monkeypatch.setattr(ours.labeler, "ignore_iof_thresh", 0.5)
    reset_average(pair)
    _, _, ignored = losses_and_gradients(ours, [crowd])
    assert ignored["num_pos_anchors"] == without["num_pos_anchors"]
    assert ignored["retinanet/cls_foreground"] == without["retinanet/cls_foreground"]
    assert ignored["retinanet/cls_background"] < without["retinanet/cls_background"]

    with pytest.raises(ConfigError, match="IGNORE_IOF_THRESH needs the field gt_iscrowd"):
        losses_and_gradients(ours, [crowd, record(2, boxes, classes)])


@pytest.mark.parametrize("option", ["loss_in_place", "loss_backend"])
def test_loss_options_do_not_change_the_result(pair, monkeypatch, option):
    """In place or in plain PyTorch: the same losses and gradients."""
    ours, _ = pair
    results = []
    for value in (getattr(ours, option), {"loss_in_place": True, "loss_backend": "eager"}[option]):
        monkeypatch.setattr(ours, option, value)
        reset_average(pair)
        losses, grads, _ = losses_and_gradients(ours, BATCHES["many gt"])
        results.append([*losses.values(), *grads.values()])
    for got, expected in zip(*results):
        scale = expected.abs().max()
        torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-6)


def test_loss_in_place_excludes_pictures():
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.LOSS_IN_PLACE, cfg.VIS_PERIOD = True, 20
    with pytest.raises(ConfigError, match="LOSS_IN_PLACE overwrites the logits .* VIS_PERIOD 20"):
        build_model(cfg)


def test_inference_does_not_need_the_loss_backend():
    """A config that was trained with another backend detects; an unknown name raises."""
    cfg = detectron2_cfg("FocalRetinaNet")
    cfg.MODEL.RETINANET.LOSS_BACKEND = "triton"
    assert len(build_model(cfg).eval()([{"image": image(0)}])) == 1
    cfg.MODEL.RETINANET.LOSS_BACKEND = "cuda"
    with pytest.raises(ConfigError, match="LOSS_BACKEND: unknown 'cuda'; known: auto, eager"):
        build_model(cfg)


def test_missing_instances_raise(pair):
    model = pair[0].train()
    with pytest.raises(ConfigError, match=r"no 'instances': .*is_train=True"):
        model([{"image": image(0)}])
    model.eval()


def test_forward_training_takes_detectron2s_arguments(pair):
    """A subclass with a ``forward`` of its own gets the same losses, crowds included."""
    model = pair[0].train()
    one = record(9, [[10, 12, 60, 75], [20, 20, 90, 90]], [7, 8])
    one["instances"].gt_iscrowd = torch.tensor([False, True])
    images = model.preprocess_image([one])
    features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
    with EventStorage():
        reset_average(pair)
        expected = model([one])
        reset_average(pair)
        losses = model.forward_training(images, features, model.head(features), [one["instances"]])
    model.eval()
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())


def test_a_labeler_of_your_own_gets_the_instances(pair, monkeypatch):
    """All of them, with the fields of the mapper."""
    model, seen = pair[0].train(), []
    labeler = model.labeler

    def label(anchors_R4, gt_instances):
        seen.extend(gt_instances)
        return labeler(anchors_R4, gt_instances)

    monkeypatch.setattr(model, "labeler", label)
    one = record(9, [[10, 12, 60, 75], [20, 20, 90, 90]], [7, 8])
    one["instances"].gt_iscrowd = torch.tensor([False, True])
    with EventStorage():
        model([one])
    model.eval()
    assert seen[0].gt_classes.tolist() == [7, 8] and seen[0].gt_iscrowd.tolist() == [False, True]


@pytest.mark.parametrize("period, iteration, shown", [(0, 0, 0), (2, 4, 1), (2, 5, 0)])
def test_pictures_show_pixels_and_objects(pair, monkeypatch, period, iteration, shown):
    """Every ``vis_period`` iterations; crowds are no objects."""
    model, seen = pair[0], []
    monkeypatch.setattr(model, "vis_period", period)
    visualize = model.visualize_training
    monkeypatch.setattr(
        model, "visualize_training", lambda *args: seen.append(args) or visualize(*args)
    )
    one = record(9, [[10, 12, 60, 75], [20, 20, 90, 90]], [7, 8])
    one["instances"].gt_iscrowd = torch.tensor([False, True])
    model.train()
    with EventStorage(iteration) as storage:
        model([one, record(10, [], [])])
        assert len(storage._vis_data) == len(seen) == shown
    model.eval()
    for inputs, detections in seen:
        assert inputs[0]["instances"].gt_boxes.tensor.tolist() == [[10, 12, 60, 75]]
        assert torch.equal(inputs[0]["image"], one["image"])
        assert len(inputs) == len(detections) == 1


def test_all_fields_of_a_record_reach_preprocess_image(pair, monkeypatch):
    model, seen = pair[0], []
    preprocess = model.preprocess_image
    monkeypatch.setattr(model, "preprocess_image", lambda x: seen.append(x[0]) or preprocess(x))
    model([{"image": image(0), "file_name": "a.jpg"}])
    assert seen[0]["file_name"] == "a.jpg"
