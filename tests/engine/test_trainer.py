"""A few iterations: what is saved, resumed, kept as the best, drawn and shown."""

import io
import itertools
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from PIL import Image

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.engine import Trainer, report
from retina_plugin.engine.trainer import check_batch_size
from retina_plugin.errors import ConfigError


class Stop(Exception):
    """What interrupts a training here."""


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Stop


class Losses(HookBase):
    """Total loss by iteration."""

    def __init__(self):
        self.by_iteration = {}

    def after_step(self):
        self.by_iteration[self.trainer.iter] = self.trainer.storage.latest()["total_loss"][0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(cfg, *hooks, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


def interrupt(cfg, at, *hooks):
    """Train up to before iteration ``at``, where it fails."""
    with pytest.raises(Stop):
        train(cfg, *hooks, StopAt(at))


@pytest.fixture
def one_batch(monkeypatch, tiny_cfg):
    """The same two images in every iteration: Detectron2's sampler starts anew after a resume."""
    batch = next(iter(Trainer.build_train_loader(tiny_cfg)))
    loader = classmethod(lambda cls, cfg: itertools.repeat(batch))
    monkeypatch.setattr(Trainer, "build_train_loader", loader)


@pytest.fixture
def measured_ap(monkeypatch):
    """Evaluations that give the numbers appended to this list, in turn."""
    aps = []

    def test(cls, cfg, model):
        return {"bbox": {"AP": aps.pop(0)}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    return aps


def load(cfg, name):
    return torch.load(Path(cfg.OUTPUT_DIR) / name, weights_only=False)


def colours(path):
    """Pixels of a PNG as (H, W, 3) integers; Pillow reads every byte of it."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count(pixels, rgb):
    """Pixels near a colour."""
    return int((abs(pixels - np.array(rgb)).max(axis=2) < 80).sum())


LIME, ORANGE, FIRST_LINE = (0, 255, 0), (255, 165, 0), (31, 119, 180)


def test_the_checkpoint_holds_the_moving_average(tiny_cfg, one_batch):
    """NORMALIZER ema: the average after two steps, neither the first value nor the next."""
    tiny_cfg.MODEL.RETINANET.NORMALIZER = "ema"
    trainer = train(tiny_cfg)
    saved = load(tiny_cfg, "model_final.pth")["trainer"]["loss_normalizer_ema"]
    positives = trainer.storage.history("num_pos_anchors").values()
    expected = 100.0
    for mean, _ in positives:
        expected = 0.9 * expected + 0.1 * max(2 * mean, 1)  # mean over 2 images
    assert len(positives) == 2 and saved != 100.0
    assert saved == pytest.approx(expected)
    assert saved == trainer.model.normalizer.ema.item()


FAST = [
    *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.ACCUMULATE", 2),
    *("MODEL.CHANNELS_LAST", True, "MODEL.ACTIVATION_CHECKPOINTING", True),
    *("INPUT.PAD_DIVISOR", 128, "TEST.PRECISION", "bfloat16"),
]


@pytest.mark.parametrize(
    ("normalizer", "options"),
    [("ema", []), ("per_image", []), ("ema", FAST)],
    ids=["ema", "per_image", "fast"],
)
def test_a_resumed_run_continues_as_an_uninterrupted_one(tiny_cfg, one_batch, normalizer, options):
    """Same losses, parameters, momenta, average and learning rates, to the bit."""
    cfg = tiny_cfg
    cfg.MODEL.RETINANET.NORMALIZER = normalizer
    cfg.merge_from_list(options)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 2
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (5,), 4
    cfg.OUTPUT_DIR, interrupted_dir = cfg.OUTPUT_DIR + "/whole", cfg.OUTPUT_DIR + "/parts"
    torch.manual_seed(0)
    whole = Losses()
    train(cfg, whole)
    expected = load(cfg, "model_final.pth")

    cfg.OUTPUT_DIR = interrupted_dir
    torch.manual_seed(0)
    before, after = Losses(), Losses()
    interrupt(cfg, 3, before)
    torch.manual_seed(1)  # what is not loaded would differ
    trainer = train(cfg, after, resume=True)
    assert trainer.start_iter == 2
    assert list(before.by_iteration) == [0, 1, 2] and list(after.by_iteration) == [2, 3, 4, 5]
    assert whole.by_iteration == {**before.by_iteration, **after.by_iteration}

    found = load(cfg, "model_final.pth")
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    for key in ("iteration", "loss_normalizer_ema", "hooks"):
        assert found["trainer"][key] == expected["trainer"][key], key
    momenta = [state["trainer"]["_trainer"]["optimizer"]["state"] for state in (found, expected)]
    assert momenta[0].keys() == momenta[1].keys() and momenta[0]
    for index, state in momenta[1].items():
        assert torch.equal(momenta[0][index]["momentum_buffer"], state["momentum_buffer"])


def test_without_resume_a_run_starts_anew(tiny_cfg, one_batch):
    """Although there is a checkpoint."""
    train(tiny_cfg)
    assert train(tiny_cfg).start_iter == 0


def test_checkpoints_of_detectron2_can_be_resumed(tiny_cfg, one_batch):
    """They have no moving average: it starts with its first value."""
    trainer = Trainer(tiny_cfg)
    state = trainer.state_dict() | {"iteration": 7}
    assert state.pop("loss_normalizer_ema") == 100.0
    trainer.load_state_dict(state)
    assert trainer.model.normalizer.ema.item() == 100.0
    assert trainer.iter == 7


def test_a_model_without_our_normaliser_trains(tiny_cfg, one_batch):
    """Detectron2's own RetinaNet, by one key."""
    tiny_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    train(tiny_cfg)
    assert "loss_normalizer_ema" not in load(tiny_cfg, "model_final.pth")["trainer"]


@pytest.mark.parametrize(
    ("before", "after", "best", "iteration"),
    [
        ([10.0, 40.0], [30.0, 20.0], 40.0, 1),
        ([10.0, 40.0], [30.0, 50.0], 50.0, 4),
        ([float("nan"), 40.0], [45.0, 20.0], 45.0, 2),
        ([float("nan"), float("nan")], [float("nan"), 1.0], 1.0, 4),
    ],
)
def test_the_best_checkpoint_survives_a_resume(
    tiny_cfg, one_batch, measured_ap, before, after, best, iteration
):
    """model_best.pth has the highest AP of the whole training, whenever it was interrupted."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 1
    # the resumed run starts after iteration 1; the last evaluation comes after the training
    measured_ap += before
    interrupt(tiny_cfg, 2)
    measured_ap += after
    kept = []
    if best in before:
        kept = [load(tiny_cfg, "model_best.pth")]
    train(tiny_cfg, resume=True)
    assert measured_ap == []
    found = load(tiny_cfg, "model_best.pth")
    assert found["iteration"] == iteration
    record = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "model_best.json").read_text())
    assert record == {"bbox/AP": best, "iteration": iteration}
    assert (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"
    for checkpoint in kept:
        for name, value in checkpoint["model"].items():
            assert torch.equal(found["model"][name], value), name


def test_a_new_run_forgets_the_best_of_an_old_one(tiny_cfg, one_batch, measured_ap):
    """Without --resume the folder's old record does not count."""
    measured_ap += [40.0, 5.0]
    train(tiny_cfg)
    train(tiny_cfg)
    record = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "model_best.json").read_text())
    assert record["bbox/AP"] == 5.0


def test_the_best_on_another_test_set_does_not_count(tiny_cfg, one_batch, measured_ap):
    """A resumed run that evaluates on other sets starts its best anew."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 2
    measured_ap += [40.0, 5.0]
    interrupt(tiny_cfg, 2)
    path = Path(tiny_cfg.OUTPUT_DIR) / "model_best.json"
    path.write_text(json.dumps({"another_set/bbox/AP": 40.0, "iteration": 1}))
    train(tiny_cfg, resume=True)
    assert json.loads(path.read_text()) == {"bbox/AP": 5.0, "iteration": 4}


def test_the_best_of_several_test_sets_is_the_first_ones(tiny_cfg, one_batch):
    """Detectron2 names the metrics by set then; both sets are evaluated."""
    tiny_cfg.DATASETS.TEST = ("digits_scenes_val", "digits_scenes_train")
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained: else there is no AP
    train(tiny_cfg)
    series = report.read_metrics(Path(tiny_cfg.OUTPUT_DIR) / "metrics.json")
    record = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "model_best.json").read_text())
    assert record["digits_scenes_val/bbox/AP"] == series["digits_scenes_val/bbox/AP"][-1][1]
    assert "digits_scenes_train/bbox/AP" in series
    assert (Path(tiny_cfg.OUTPUT_DIR) / "model_best.pth").is_file()


def test_classes_that_only_loading_the_data_tells(tiny_cfg, tiny_digits):
    """A dataset of one's own is checked before the first iteration too."""
    register_coco_instances("test_own", {}, str(tiny_digits / "train.json"), str(tiny_digits))
    try:
        tiny_cfg.DATASETS.TRAIN = ("test_own",)
        tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 4
        tiny_cfg.DATASETS.TEST = ()
        with pytest.raises(ConfigError, match="NUM_CLASSES is 4, but test_own has 10 classes"):
            Trainer(tiny_cfg)
    finally:
        DatasetCatalog.remove("test_own")
        MetadataCatalog.pop("test_own")


@pytest.mark.parametrize(
    ("batch", "processes", "nearest", "base_lr"),
    [(16, 3, 15, "0.009375"), (1, 4, 4, "0.04"), (14, 8, 16, "0.0114286")],
)
def test_a_batch_that_cannot_be_split(tiny_cfg, batch, processes, nearest, base_lr):
    """One line with the nearest batch that can and its learning rate."""
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.BASE_LR = batch, 0.01
    with pytest.raises(ConfigError) as error:
        check_batch_size(tiny_cfg, processes)
    assert str(error.value) == (
        f"SOLVER.IMS_PER_BATCH {batch} cannot be split over {processes} processes: set it to "
        f"{nearest} and SOLVER.BASE_LR to {base_lr}"
    )
    check_batch_size(tiny_cfg, batch)
    check_batch_size(tiny_cfg, 1)


def test_a_batch_that_the_passes_cannot_share(tiny_cfg):
    """Processes times passes, and both are named."""
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.ACCUMULATE = 16, 4
    check_batch_size(tiny_cfg, 4)
    with pytest.raises(ConfigError) as error:
        check_batch_size(tiny_cfg, 8)
    assert str(error.value).startswith(
        "SOLVER.IMS_PER_BATCH 16 cannot be split over 8 processes of SOLVER.ACCUMULATE 4 passes: "
        "set it to 32 and"
    )


def test_the_keys_of_the_solver_reach_the_step(tiny_cfg, one_batch, monkeypatch):
    """Precision, passes and the options of DistributedDataParallel."""
    seen = []
    monkeypatch.setattr(
        "retina_plugin.engine.trainer.make_ddp_model",
        lambda model, **options: seen.append(options) or model,
    )
    plain = Trainer(tiny_cfg)._trainer
    assert (plain.passes, plain.precision, plain.grad_scaler) == (1, None, None)
    tiny_cfg.merge_from_list(FAST)
    tiny_cfg.SOLVER.DDP.STATIC_GRAPH = tiny_cfg.SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW = True
    tiny_cfg.SOLVER.DDP.COMPRESSION = "bfloat16"
    fast = Trainer(tiny_cfg)._trainer
    assert (fast.passes, fast.precision, fast.grad_scaler) == (2, torch.bfloat16, None)
    names = ("static_graph", "gradient_as_bucket_view", "compression", "passes")
    assert seen == [
        dict(zip(names, (False, False, "none", 1))),
        dict(zip(names, (True, True, "bfloat16", 2))),
    ]
    tiny_cfg.SOLVER.AMP.PRECISION = "float16"
    with pytest.raises(ConfigError, match="PRECISION float16 needs a GPU"):
        Trainer(tiny_cfg)


def test_a_run_shorter_than_the_log_period(tiny_cfg, one_batch):
    """As on a GPU: the same numbers as with a log of each iteration, and a NaN is not missed."""
    written = []
    for period in (1, 20):
        tiny_cfg.OUTPUT_DIR += f"_{period}"
        Path(tiny_cfg.OUTPUT_DIR).mkdir()
        torch.manual_seed(0)
        trainer = Trainer(tiny_cfg)
        trainer._trainer.log_period = period
        trainer.train()
        lines = (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
        written.append({k: v for line in lines for k, v in json.loads(line).items()})
        assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1]
    for name in ("total_loss", "loss_cls", "loss_box_reg", "num_pos_anchors"):
        assert written[0][name] == written[1][name]
    trainer = Trainer(tiny_cfg)
    trainer._trainer.log_period = 20
    torch.nn.init.constant_(trainer.model.head.cls_score.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="iteration=0"):
        trainer.train()


@pytest.mark.parametrize("quiet", [True, False])
def test_where_nobody_has_set_up_the_log(tiny_cfg, one_batch, monkeypatch, quiet):
    """In a notebook: Detectron2's lines are shown; a log that is there is left alone."""
    calls = []
    monkeypatch.setattr("retina_plugin.engine.trainer.setup_logger", lambda: calls.append(1))
    logging.getLogger("detectron2").setLevel(logging.WARNING if quiet else logging.INFO)
    Trainer(tiny_cfg)
    assert len(calls) == quiet


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
def test_images_are_read_by_the_mapper_of_the_config(tiny_cfg, monkeypatch, name):
    """In training, evaluation and on the sheet."""
    cls, built = DATASET_MAPPER_REGISTRY.get(name), []
    from_config = cls.from_config.__func__
    monkeypatch.setattr(
        cls,
        "from_config",
        classmethod(lambda c, cfg, train: built.append(train) or from_config(c, cfg, train)),
    )
    tiny_cfg.INPUT.MAPPER = name
    assert len(next(iter(Trainer.build_train_loader(tiny_cfg)))) == 2
    assert (
        "instances" not in next(iter(Trainer.build_test_loader(tiny_cfg, "digits_scenes_val")))[0]
    )
    report.draw_detections(tiny_cfg, Detector(0.9), tiny_cfg.OUTPUT_DIR + ".png", num_images=1)
    assert built == [True, False, False]


def test_a_training_leaves_pictures(tiny_cfg):
    """Real ones: training curves, and a sheet of the validation images with ground truth."""
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained: else there is no AP
    train(tiny_cfg)
    out = Path(tiny_cfg.OUTPUT_DIR)
    curves = colours(out / "training_curves.png")
    assert count(curves, FIRST_LINE) > 50
    sheet = colours(out / "detections.png")
    assert count(sheet, LIME) > 500
    assert all(quarter.std() > 10 for quarter in np.array_split(sheet, 4, axis=1))  # 4 images
    series = report.read_metrics(out / "metrics.json")
    for name in ("total_loss", "lr", "bbox/AP", "retinanet/num_pos_p3"):
        assert name in series, name


def test_an_interrupted_training_draws_nothing(tiny_cfg, one_batch):
    """Its exception is what is to be seen."""
    interrupt(tiny_cfg, 1)
    assert not list(Path(tiny_cfg.OUTPUT_DIR).glob("*.png"))


def write_metrics(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_metrics_after_a_resume(tmp_path):
    """Where the iterations step back, what stood there from there on is of another training."""
    lines = [{"iteration": i, "lr": lr} for i, lr in [(0, 1), (20, 2), (40, 3), (20, 4), (60, 5)]]
    metrics = write_metrics(tmp_path / "metrics.json", lines)
    assert report.read_metrics(metrics) == {"lr": [(0, 1), (20, 4), (60, 5)]}


def test_training_curves_show_what_was_measured(tmp_path):
    """A panel for what there is and none for what there is not; other values, another picture."""

    def draw(name, **values):
        lines = [{"iteration": i, "total_loss": 2.0 - i / 10, **values} for i in range(5)]
        write_metrics(tmp_path / "metrics.json", lines)
        report.draw_training_curves(tmp_path / "metrics.json", tmp_path / name)
        return colours(tmp_path / name)

    losses = draw("a.png")
    with_ap = draw("b.png", **{"bbox/AP": 10.0})
    with_other = draw("c.png", **{"bbox/AP": float("nan"), "bbox/AP50": 20.0})
    assert with_ap.shape[0] == losses.shape[0]
    assert with_ap.shape == with_other.shape and with_ap.shape[1] == 2 * losses.shape[1]
    assert (with_ap != with_other).any()


class Detector(torch.nn.Module):
    """Finds one box on each image, with a score."""

    def __init__(self, score):
        super().__init__()
        self.score = score
        self.modes = []

    def forward(self, inputs):
        self.modes.append(self.training)
        (x,) = inputs
        instances = Instances((x["height"], x["width"]))
        instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 60.0, 60.0]]))
        instances.scores = torch.tensor([self.score])
        instances.pred_classes = torch.tensor([3])
        return [{"instances": instances}]


def test_the_sheet_has_ground_truth_and_detections(tiny_cfg, tmp_path):
    """Each in its colour, detections only above the threshold; without annotations, no truth."""
    records = [r | {"annotations": []} for r in DatasetCatalog.get("digits_scenes_val")]
    DatasetCatalog.register("test_no_truth", lambda: records)
    sheets = {}
    try:
        for name in ("digits_scenes_val", "test_no_truth"):
            tiny_cfg.DATASETS.TEST = (name,)
            for score in (0.9, 0.2):
                report.draw_detections(tiny_cfg, Detector(score), tmp_path / "a.png")
                sheets[name, score] = colours(tmp_path / "a.png")
    finally:
        DatasetCatalog.remove("test_no_truth")
        MetadataCatalog.pop("test_no_truth")
    bare = sheets["test_no_truth", 0.2]
    truth, found = sheets["digits_scenes_val", 0.2], sheets["test_no_truth", 0.9]
    assert count(truth, LIME) > count(bare, LIME) + 1000
    assert count(found, ORANGE) > count(bare, ORANGE) + 1000
    both = sheets["digits_scenes_val", 0.9]
    assert count(both, LIME) > count(bare, LIME) + 500
    assert count(both, ORANGE) > count(bare, ORANGE) + 500


def test_the_sheet_leaves_the_model_in_its_mode(tiny_cfg, tmp_path):
    """Which is evaluation while it is drawn, once for each image."""
    training, evaluating = Detector(0.9).train(), Detector(0.9).eval()
    for model in (training, evaluating):
        report.draw_detections(tiny_cfg, model, tmp_path / "a.png")
    assert training.modes == evaluating.modes == [False] * 4
    assert training.training and not evaluating.training


def test_the_sheet_shows_at_most_so_many(tiny_cfg, tmp_path):
    """num_images of them, from the first to the last."""
    model = Detector(0.9)
    report.draw_detections(tiny_cfg, model, tmp_path / "a.png", num_images=2)
    assert len(model.modes) == 2


def test_no_sheet_without_a_test_set(tiny_cfg, tmp_path):
    """DATASETS.TEST may be empty."""
    tiny_cfg.DATASETS.TEST = ()
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def train_on(stream, cfg, monkeypatch, *hooks):
    """Everything that a training prints on ``stream``, and its log file."""
    cfg.SOLVER.MAX_ITER = 4  # Detectron2 gives an ETA from the third on
    monkeypatch.setattr(sys, "stdout", stream)
    setup_logger(cfg.OUTPUT_DIR)
    train(cfg, *hooks)
    return stream.getvalue(), (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()


def test_a_bar_on_a_terminal(tiny_cfg, one_batch, monkeypatch):
    """Iterations, ETA, loss and memory; Detectron2's progress lines are in the log file only."""
    losses = Losses()
    printed, logged = train_on(Terminal(), tiny_cfg, monkeypatch, losses)
    bar = re.findall(r"train: +(\d+)%\|[^\r\n]*\| (\d+)/4 \[([^\]]*)\]", printed)
    assert bar[-1][:2] == ("100", "4")
    eta, memory, shown_loss = re.search(
        r"\d\d:\d\d<(\d\d:\d\d), .*mem=([\d.]+)G, loss=([\d.]+)$", bar[-1][2]
    ).groups()
    assert eta == "00:00" and float(memory) > 0.1
    assert float(shown_loss) == pytest.approx(losses.by_iteration[3], abs=1e-3)
    assert re.search(r"eta: [\d:]+ +iter: 3 +total_loss: [\d.]+", logged)
    assert "total_loss" not in printed
    assert "Starting training from iteration 0" in printed  # other lines appear above the bar
    assert "Total training time" in printed


def test_the_bar_starts_where_the_training_resumes(tiny_cfg, one_batch, monkeypatch):
    """Not at 0."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    interrupt(tiny_cfg, 2)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    train(tiny_cfg, resume=True)
    counts = [int(n) for n in re.findall(r"\| (\d)/4 \[", stream.getvalue())]
    assert min(counts) == 2 and max(counts) == 4


def test_no_bar_where_there_is_no_terminal(tiny_cfg, one_batch, monkeypatch):
    """Then Detectron2's lines are printed as ever."""
    printed, logged = train_on(io.StringIO(), tiny_cfg, monkeypatch)
    assert "train:" not in printed and "\r" not in printed and "it/s" not in printed
    for text in (printed, logged):
        assert re.search(r"iter: 3 +total_loss: [\d.]+", text)


def test_handlers_are_restored_after_the_bar(tiny_cfg, one_batch, monkeypatch):
    """A second training without a terminal prints its lines again."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    logger = setup_logger(tiny_cfg.OUTPUT_DIR)
    train(tiny_cfg)
    before = stream.getvalue()
    logger.getChild("utils.events").info("total_loss again")
    assert stream.getvalue()[len(before) :].count("total_loss again") == 1


def picture(cfg, batch, iteration=0):
    """(name, (H, W, 3) pixels) that one training step puts into the storage."""
    model = Trainer.build_model(cfg)
    with EventStorage(iteration) as storage:
        model(batch)
    if not storage._vis_data:
        return None
    ((name, image, at),) = storage._vis_data
    assert at == iteration and image.shape[0] == 3
    return name, np.asarray(image).transpose(1, 2, 0).astype(int)


def test_vis_period_shows_ground_truth_and_predictions(tiny_cfg):
    """Top: the first image with its ground truth; bottom: the same with what the model found."""
    batch = next(iter(Trainer.build_train_loader(tiny_cfg)))
    tiny_cfg.VIS_PERIOD = 1
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained: else it finds nothing
    name, pixels = picture(tiny_cfg, batch)
    assert "GT" in name
    top, bottom = np.split(pixels, 2)
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    _, nothing = picture(tiny_cfg, batch)
    top_again, plain = np.split(nothing, 2)
    original = batch[0]["image"].permute(1, 2, 0).numpy()[:, :, ::-1].astype(int)
    batch_bgr = original[:, :, ::-1]
    # nothing found: the image itself, in RGB; some matplotlib shift it by half a pixel
    difference, with_bgr = (abs(plain - image).mean() for image in (original, batch_bgr))
    assert difference < 20 and difference < with_bgr
    drawn_top, drawn_bottom, drawn_top_again = (
        abs(half - plain).max(axis=2) > 5 for half in (top, bottom, top_again)
    )
    # Detectron2 draws in colours of its own choice; where is what matters
    boxes = batch[0]["instances"].gt_boxes.tensor.round().int().tolist()
    assert boxes
    for drawn in (drawn_top, drawn_top_again):
        rest = drawn.copy()
        for x1, y1, x2, y2 in boxes:
            left, right = max(x1 - 2, 0), x2 + 3
            assert drawn[y1:y2, left : x1 + 3].any(axis=1).mean() > 0.9
            rest[max(y1 - 2, 0) : y2 + 3, left:right] = False
        assert not rest.any()
    assert drawn_bottom.sum() > 40 and (drawn_bottom != drawn_top).any()


@pytest.mark.parametrize(
    ("period", "iteration", "shown"), [(0, 0, False), (3, 3, True), (3, 4, False)]
)
def test_vis_period_is_a_period(tiny_cfg, period, iteration, shown):
    """0 is never."""
    tiny_cfg.VIS_PERIOD = period
    batch = next(iter(Trainer.build_train_loader(tiny_cfg)))
    assert (picture(tiny_cfg, batch, iteration) is not None) == shown
