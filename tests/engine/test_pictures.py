"""Pictures in TensorBoard's event file: of detections after an evaluation, and VIS_PERIOD's."""

import random

import numpy as np
import pytest
import torch
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retina_plugin.engine import Trainer, report
from retina_plugin.engine.pictures import EvaluationPictures

FILES = ["1_000001", "2_000002", "3_000003", "4_000004"]


def train(cfg, trainer_class=Trainer):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def pictures(cfg):
    """Name -> [(iteration, width, height), ...] of the event file."""
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0})
    events.Reload()
    return {
        name: [(image.step, image.width, image.height) for image in events.Images(name)]
        for name in events.Tags()["images"]
    }


def test_the_same_images_are_drawn_after_each_evaluation(tiny_cfg):
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.TEST.EVAL_PERIOD = 4, 2
    train(tiny_cfg)
    found = pictures(tiny_cfg)
    # 64 pixels are drawn in 480, and iteration 4 is after the last one.
    assert found == {f"detections/{file}": [(1, 480, 480), (4, 480, 480)] for file in FILES}


def test_vis_period_is_in_the_event_file(tiny_cfg):
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.VIS_PERIOD, tiny_cfg.DATASETS.TEST = 5, 2, ()
    train(tiny_cfg)
    ((name, found),) = pictures(tiny_cfg).items()
    assert "GT" in name and [step for step, *_ in found] == [0, 2, 4]


def test_nothing_is_drawn_that_nobody_reads(tiny_cfg, monkeypatch, tmp_path):
    class Quiet(Trainer):
        def build_writers(self):
            return [CommonMetricPrinter(2), JSONWriter(str(tmp_path / "metrics.json"))]

    def draw(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(report, "draw_images", draw)
    monkeypatch.setattr(report, "draw_detections", lambda *args, **kwargs: None)
    trainer = train(tiny_cfg, Quiet)
    assert trainer.last_evaluation and not trainer.storage._vis_data


def test_drawing_draws_no_random_number_and_leaves_the_model_in_training(tiny_cfg):
    trainer = Trainer(tiny_cfg)
    hook = next(h for h in trainer._hooks if isinstance(h, EvaluationPictures))
    trainer.model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with EventStorage() as trainer.storage:
        hook._draw()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after and trainer.model.training
    shown = [name for name, *_ in trainer.storage._vis_data]
    assert shown == [f"detections/{file}" for file in FILES]


def test_picture_that_cannot_be_drawn_is_a_warning(tiny_cfg, monkeypatch, log):
    def draw(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(report, "draw_images", draw)
    train(tiny_cfg)
    assert "a picture of detections is not drawn: MemoryError: no room" in log.text


@pytest.mark.parametrize(("number", "chosen"), [(4, [0, 3, 6, 9]), (1, [0]), (20, list(range(10)))])
def test_images_are_chosen_evenly(number, chosen):
    dataset = [{"image_id": i} for i in range(10)]
    assert [r["image_id"] for r in report.choose_evenly(dataset, number)] == chosen
    assert report.choose_evenly([], number) == []
