"""Trainings of a few iterations: checkpoints, resuming, the best checkpoint, progress, results."""

import copy
import io
import itertools
import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from PIL import Image

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.engine import Trainer, report
from retina_plugin.engine.hooks import Progress
from retina_plugin.errors import ConfigError
from retina_plugin.weights import read_checkpoint


class Stop(Exception):
    """Interrupts a training."""


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Stop


class Losses(HookBase):
    """Keeps the total loss of each iteration."""

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
    """Train, and raise before iteration ``at``."""
    with pytest.raises(Stop):
        train(cfg, *hooks, StopAt(at))


@pytest.fixture
def one_batch(monkeypatch, tiny_cfg):
    """Every iteration has the same images."""
    batch = next(iter(Trainer.build_train_loader(tiny_cfg)))
    loader = classmethod(lambda cls, cfg: itertools.repeat(batch))
    monkeypatch.setattr(Trainer, "build_train_loader", loader)


@pytest.fixture
def measured_ap(monkeypatch):
    """Each evaluation returns the next AP of this list."""
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


def test_checkpoint_has_the_moving_average(tiny_cfg, one_batch):
    """Of NORMALIZER ema, after two steps."""
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


def test_precise_batch_norm_changes_batch_norm_alone(tiny_cfg):
    """It runs whole batches, and the average of the normaliser counts the positives of a pass."""
    options = ["MODEL.RETINANET.NORMALIZER", "ema", "SOLVER.ACCUMULATE", 2, "SOLVER.MAX_ITER", 1]
    of_hook = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3]
    tiny_cfg.merge_from_list([*options, "MODEL.FPN.NORM", "BN", *of_hook])
    trainer = train(tiny_cfg)
    model = trainer.model
    (precise_bn,) = [hook for hook in trainer._hooks if isinstance(hook, hooks.PreciseBN)]
    before = {name: x.clone() for name, x in (*model.named_buffers(), *model.named_parameters())}
    state, storage = torch.get_rng_state(), trainer.storage.latest().copy()
    precise_bn.update_stats()
    after = dict((*model.named_buffers(), *model.named_parameters()))
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    statistics = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert "normalizer.ema" in before and before["normalizer.ema"] != 100.0
    assert changed == statistics and changed
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.storage.latest() == storage


FAST = [
    *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.ACCUMULATE", 2),
    *("MODEL.CHANNELS_LAST", True, "MODEL.ACTIVATION_CHECKPOINTING", True),
    *("TEST.PRECISION", "bfloat16"),
]


@pytest.mark.parametrize(
    ("normalizer", "options"),
    [
        pytest.param("ema", [], id="ema"),
        pytest.param("per_image", [], id="per_image", marks=pytest.mark.slow),
        pytest.param("ema", FAST, id="fast", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tiny_cfg, normalizer, options):
    """Losses, parameters, momenta, moving average and learning rates are equal to the bit."""
    cfg = tiny_cfg
    cfg.MODEL.RETINANET.NORMALIZER = normalizer
    cfg.merge_from_list(options)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 2
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (5,), 4
    cfg.OUTPUT_DIR, interrupted_dir = cfg.OUTPUT_DIR + "/whole", cfg.OUTPUT_DIR + "/parts"
    seed_all_rng(0)
    whole = Losses()
    train(cfg, whole)
    expected = load(cfg, "model_final.pth")

    cfg.OUTPUT_DIR = interrupted_dir
    seed_all_rng(0)
    before, after = Losses(), Losses()
    interrupt(cfg, 3, before)
    seed_all_rng(1)  # so that anything that is not loaded differs
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


@pytest.mark.slow
def test_run_without_resume_starts_at_zero(tiny_cfg, one_batch):
    """Although the folder has a checkpoint."""
    train(tiny_cfg)
    assert train(tiny_cfg).start_iter == 0


def test_checkpoints_of_detectron2_can_be_resumed(tiny_cfg, one_batch):
    """They have no moving average, so it starts with its first value."""
    trainer = Trainer(tiny_cfg)
    state = trainer.state_dict() | {"iteration": 7}
    assert state.pop("loss_normalizer_ema") == 100.0
    trainer.load_state_dict(state)
    assert trainer.model.normalizer.ema.item() == 100.0
    assert trainer.iter == 7


def test_moving_average_of_passes_of_another_size(tiny_cfg, one_batch):
    """Resumed on twice as many processes, each sees half of the positives."""
    trainer = Trainer(tiny_cfg)
    trainer.model.normalizer.ema.fill_(12.0)
    state = trainer.state_dict() | {"iteration": 7}
    trainer.load_state_dict(state | {"images_per_pass": 2 * state["images_per_pass"]})
    assert trainer.model.normalizer.ema.item() == 6.0


@pytest.mark.slow
def test_model_without_our_normaliser_trains(tiny_cfg, one_batch):
    """Such as Detectron2's own RetinaNet."""
    tiny_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    train(tiny_cfg)
    assert "loss_normalizer_ema" not in load(tiny_cfg, "model_final.pth")["trainer"]


@pytest.mark.parametrize(
    ("before", "after", "best", "iteration"),
    [
        ([10.0, 40.0], [30.0, 20.0], 40.0, 1),
        pytest.param([10.0, 40.0], [30.0, 50.0], 50.0, 4, marks=pytest.mark.slow),
        pytest.param([float("nan"), 40.0], [45.0, 20.0], 45.0, 2, marks=pytest.mark.slow),
        ([float("nan"), float("nan")], [float("nan"), 1.0], 1.0, 4),
    ],
)
def test_best_checkpoint_survives_a_resume(
    tiny_cfg, one_batch, measured_ap, before, after, best, iteration
):
    """model_best.pth has the highest AP of the whole training, before and after the resume."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 1
    # The resumed run starts with iteration 2, and evaluates last after the training.
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


@pytest.mark.slow
def test_new_run_ignores_an_older_best(tiny_cfg, one_batch, measured_ap):
    """Which is in the folder, but the run does not resume."""
    measured_ap += [40.0, 5.0]
    train(tiny_cfg)
    train(tiny_cfg)
    record = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "model_best.json").read_text())
    assert record["bbox/AP"] == 5.0


def test_best_on_another_test_set_is_ignored(tiny_cfg, one_batch, measured_ap):
    """A resumed run with another DATASETS.TEST looks for its own best."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 2
    measured_ap += [40.0, 5.0]
    interrupt(tiny_cfg, 2)
    path = Path(tiny_cfg.OUTPUT_DIR) / "model_best.json"
    assert json.loads(path.read_text()) == {"bbox/AP": 40.0, "iteration": 1}
    tiny_cfg.DATASETS.TEST = ("digits_scenes_dev",)
    train(tiny_cfg, resume=True)
    assert json.loads(path.read_text()) == {"bbox/AP": 5.0, "iteration": 4}


def test_best_is_measured_on_the_first_test_set(tiny_cfg, one_batch):
    """All sets are evaluated; Detectron2 puts the name of the set before each metric."""
    tiny_cfg.DATASETS.TEST = ("digits_scenes_val", "digits_scenes_train")
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained: else there is no AP
    train(tiny_cfg)
    series = report.read_metrics(Path(tiny_cfg.OUTPUT_DIR) / "metrics.json")
    record = json.loads((Path(tiny_cfg.OUTPUT_DIR) / "model_best.json").read_text())
    assert record["digits_scenes_val/bbox/AP"] == series["digits_scenes_val/bbox/AP"][-1][1]
    assert "digits_scenes_train/bbox/AP" in series
    assert (Path(tiny_cfg.OUTPUT_DIR) / "model_best.pth").is_file()


def test_number_of_classes_is_checked_after_loading(tiny_cfg, tiny_digits):
    """A registered COCO file tells its classes only when it is loaded."""
    register_coco_instances("test_own", {}, str(tiny_digits / "train.json"), str(tiny_digits))
    try:
        tiny_cfg.DATASETS.TRAIN = ("test_own",)
        tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 4
        tiny_cfg.DATASETS.TEST = ()
        with pytest.raises(ConfigError, match="NUM_CLASSES: is 4, but test_own has 10 classes"):
            Trainer(tiny_cfg)
    finally:
        DatasetCatalog.remove("test_own")
        MetadataCatalog.pop("test_own")


def test_trainer_reads_the_keys_of_the_step(tiny_cfg, one_batch):
    """Precision and passes; the loss scaler is for float16, which needs a GPU."""
    plain = Trainer(tiny_cfg)._trainer
    assert (plain.passes, plain.precision, plain.grad_scaler) == (1, None, None)
    tiny_cfg.merge_from_list(FAST)
    fast = Trainer(tiny_cfg)._trainer
    assert (fast.passes, fast.precision, fast.grad_scaler) == (2, torch.bfloat16, None)
    tiny_cfg.SOLVER.AMP.PRECISION = "float16"
    with pytest.raises(ConfigError, match="PRECISION: float16 needs a GPU"):
        Trainer(tiny_cfg)


def test_uneven_batch_raises(tiny_cfg):
    """Before the model is built."""
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.ACCUMULATE = 3, 2
    with pytest.raises(ConfigError, match="IMS_PER_BATCH: 3 cannot be split over 1 process of"):
        Trainer(tiny_cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.REFERENCE_WORLD_SIZE", 3], "^SOLVER.REFERENCE_WORLD_SIZE: 3 processes cannot"),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
            + ["SOLVER.BASE_LR_END", 0.001],
            "^SOLVER.BASE_LR_END: must be .* scaled it to 1 process.: change it, or set SOLVER.REF",
        ),
    ],
)
def test_schedule_that_cannot_be_scaled_raises(tiny_cfg, monkeypatch, options, message):
    """Before anything is built."""
    monkeypatch.setattr(Trainer, "build_model", None)
    tiny_cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 8, *options])
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny_cfg)


@pytest.mark.slow
def test_run_shorter_than_the_log_period(tiny_cfg, one_batch):
    """It logs the same numbers as with period 1, and a NaN still raises. GPUs use period 20."""
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
def test_trainer_sets_up_the_log_if_nobody_has(tiny_cfg, one_batch, monkeypatch, quiet):
    """In a notebook, for example. A log that is set up is not changed."""
    calls = []
    monkeypatch.setattr("retina_plugin.engine.trainer.setup_logger", lambda: calls.append(1))
    logging.getLogger("detectron2").setLevel(logging.WARNING if quiet else logging.INFO)
    Trainer(tiny_cfg)
    assert len(calls) == quiet


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
def test_mapper_of_the_config_reads_the_images(tiny_cfg, monkeypatch, name):
    """In training and evaluation, and for the picture of detections."""
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
    model = Trainer.build_model(tiny_cfg)
    report.draw_detections(tiny_cfg, model, tiny_cfg.OUTPUT_DIR + ".png", num_images=1)
    assert built == [True, False, False]


def test_training_draws_pictures(tiny_cfg):
    """The training curves, and validation images with their ground truth."""
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


def test_interrupted_training_draws_nothing(tiny_cfg, one_batch):
    """Its exception should be the last thing on the console."""
    interrupt(tiny_cfg, 1)
    assert not list(Path(tiny_cfg.OUTPUT_DIR).glob("*.png"))


def train_on(stream, cfg, monkeypatch, *hooks):
    """Train with ``stream`` as the console; return what is printed, and the log file."""
    cfg.SOLVER.MAX_ITER = 4  # Detectron2 gives an ETA from the third on
    monkeypatch.setattr(sys, "stdout", stream)
    setup_logger(cfg.OUTPUT_DIR)
    train(cfg, *hooks)
    return stream.getvalue(), (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()


def test_terminal_shows_a_bar(tiny_cfg, one_batch, monkeypatch):
    """With iterations, time left, loss and memory. Detectron2's progress is in the log only."""
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
    assert "Starting training from iteration 0" in printed  # other lines are printed above the bar
    assert "Total training time" in printed


def test_bar_starts_at_the_resumed_iteration(tiny_cfg, one_batch, monkeypatch):
    """Not at 0."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    interrupt(tiny_cfg, 2)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    train(tiny_cfg, resume=True)
    counts = [int(n) for n in re.findall(r"\| (\d)/4 \[", stream.getvalue())]
    assert min(counts) == 2 and max(counts) == 4


def test_no_bar_without_a_terminal(tiny_cfg, one_batch, monkeypatch):
    """But lines; the log file has Detectron2's progress too."""
    printed, logged = train_on(io.StringIO(), tiny_cfg, monkeypatch)
    assert "train:" not in printed and "\r" not in printed and "it/s" not in printed
    assert re.search(r"iter: 3 +total_loss: [\d.]+", logged)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 4, [1, 2, 3, 4]),
        (0, 30, [*range(2, 31, 2)]),
        (4, 30, [*range(6, 31, 2)]),
        (0, 500, [20, *range(50, 501, 50)]),
        (0, 1001, [20, *range(100, 1001, 100), 1001]),
    ],
)
def test_progress_lines_are_few_and_at_round_numbers(tiny_cfg, log, start, end, expected):
    """The first one comes early, the last one at the end."""
    hook = Progress(tiny_cfg, io.StringIO())
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), data_loader=[], last_evaluation={})
    trainer.start_iter, trainer.max_iter = start, end
    hook.trainer = trainer
    with EventStorage() as trainer.storage:
        hook.before_train()
        for trainer.iter in range(start, end):
            trainer.storage.put_scalar("total_loss", 2.0)
            hook.after_step()
    found = [m for m in log.messages if m.startswith("iteration ")]
    assert [int(m.split()[1].split("/")[0]) for m in found] == expected
    assert len(found) <= 22 and all("loss 2.000" in m for m in found)


def test_start_of_a_training_says_what_is_trained(tiny_cfg, one_batch, log):
    """On what, how long, on which device, and where the log is; also after a resume."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    tiny_cfg.TEST.EVAL_PERIOD = 2
    interrupt(tiny_cfg, 2)
    text = "\n".join(log.messages)
    for line in (
        r"Model +FocalRetinaNet, [\d.]+ million trainable parameters",
        r"Loss +FocalLoss and smooth_l1",
        r"Weights +random \(trained from scratch\)",
        r"Trained on +digits_scenes_train, 10 classes",  # one_batch has no dataset
        r"Tested on +digits_scenes_val, every 2 iterations and at the end",
        r"Device +cpu",
        r"Length +4 iterations of 2 images",
        rf"Log +{tiny_cfg.OUTPUT_DIR}/log.txt",
    ):
        assert re.search(f"^{line}$", text, re.M), line
    log.clear()
    train(tiny_cfg, resume=True)
    text = "\n".join(log.messages)
    assert re.search(r"^Weights +the last checkpoint of ", text, re.M)
    assert re.search(r"^Length +4 iterations of 2 images, of which 2 are done$", text, re.M)


def test_each_evaluation_is_one_line_and_the_last_one_a_table(
    tiny_cfg, one_batch, measured_ap, log
):
    """NaN, the AP of no box, is left out of the line."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.TEST.EVAL_PERIOD = 3, 1
    measured_ap += [float("nan"), 12.34, 56.78]
    train(tiny_cfg)
    lines = [m for m in log.messages if m.startswith("Evaluation of iteration")]
    assert lines == [
        "Evaluation of iteration 1 on digits_scenes_val: no AP",
        "Evaluation of iteration 2 on digits_scenes_val: AP 12.3",
    ]
    (table,) = [m for m in log.messages if m.startswith("Results")]
    assert "| digits_scenes_val | 56.780 |" in table


def test_console_is_restored_after_the_bar(tiny_cfg, one_batch, monkeypatch):
    """Detectron2's lines are printed again."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    logger = setup_logger(tiny_cfg.OUTPUT_DIR)
    train(tiny_cfg)
    before = stream.getvalue()
    logger.getChild("utils.events").info("total_loss again")
    assert stream.getvalue()[len(before) :].count("total_loss again") == 1


def picture(cfg, batch, iteration=0):
    """The picture that one training step puts into the storage: (name, pixels (H, W, 3))."""
    model = Trainer.build_model(cfg)
    with EventStorage(iteration) as storage:
        model(batch)
    if not storage._vis_data:
        return None
    ((name, image, at),) = storage._vis_data
    assert at == iteration and image.shape[0] == 3
    return name, np.asarray(image).transpose(1, 2, 0).astype(int)


def test_vis_period_draws_ground_truth_and_predictions(tiny_cfg):
    """At the top the first image with its ground truth, below it with the detections."""
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
    # Without detections it is the image, in RGB. Some versions of matplotlib shift it slightly.
    difference, with_bgr = (abs(plain - image).mean() for image in (original, batch_bgr))
    assert difference < 20 and difference < with_bgr
    drawn_top, drawn_bottom, drawn_top_again = (
        abs(half - plain).max(axis=2) > 5 for half in (top, bottom, top_again)
    )
    # Detectron2 chooses the colours, so only the places of the lines are compared.
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
def test_vis_period_counts_iterations(tiny_cfg, period, iteration, shown):
    """0 draws nothing."""
    tiny_cfg.VIS_PERIOD = period
    batch = next(iter(Trainer.build_train_loader(tiny_cfg)))
    assert (picture(tiny_cfg, batch, iteration) is not None) == shown


def test_checkpoints_carry_the_class_names_and_give_them_to_another_dataset(tiny_cfg, log):
    """From a training on the digits to one on half of them, in another order."""
    tiny_cfg.SOLVER.MAX_ITER = 1
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    names = MetadataCatalog.get("digits_scenes_train").thing_classes
    path = os.path.join(tiny_cfg.OUTPUT_DIR, "model_final.pth")
    assert read_checkpoint(path)["class_names"] == list(names)

    register_half_of_the_digits(names)
    try:
        cfg = tiny_cfg.clone()
        cfg.DATASETS.TRAIN, cfg.MODEL.RETINANET.NUM_CLASSES = ("half_of_the_digits",), 5
        cfg.DATASETS.TEST = ()
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = path, os.path.join(tiny_cfg.OUTPUT_DIR, "half")
        other = Trainer(cfg)
        log.clear()
        other.resume_or_load(resume=False)
    finally:
        DatasetCatalog.remove("half_of_the_digits")
        MetadataCatalog.remove("half_of_the_digits")
    said = [r.getMessage() for r in log.records if "cls_score" in r.getMessage()]
    kept = ", ".join(list(names)[8:3:-2])
    assert said == [f"cls_score: 5 of 5 classes kept by name ({kept}, ...), 0 new"]
    for part in ("weight", "bias"):
        old = getattr(trainer.model.head.cls_score, part).unflatten(0, (9, 10))
        new = getattr(other.model.head.cls_score, part).unflatten(0, (9, 5))
        assert torch.equal(new, old[:, [8, 6, 4, 2, 0]])


def register_half_of_the_digits(names):
    """The even digits, backwards."""
    order = {8: 0, 6: 1, 4: 2, 2: 3, 0: 4}

    def records():
        found = copy.deepcopy(DatasetCatalog.get("digits_scenes_train"))
        for record in found:
            objects = [x for x in record["annotations"] if x["category_id"] in order]
            for x in objects:
                x["category_id"] = order[x["category_id"]]
            record["annotations"] = objects
        return found

    DatasetCatalog.register("half_of_the_digits", records)
    MetadataCatalog.get("half_of_the_digits").set(thing_classes=[names[i] for i in order])
