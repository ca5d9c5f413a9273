"""Pictures and tables of a training: read, drawn, and looked at."""

import json

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from retina_plugin.engine import report


def colours(path):
    """Pixels of a PNG as (H, W, 3) integers; Pillow reads every byte of it."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count(pixels, rgb):
    """Pixels near a colour."""
    return int((abs(pixels - np.array(rgb)).max(axis=2) < 80).sum())


LIME, ORANGE = (0, 255, 0), (255, 165, 0)


def write_metrics(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_metrics_of_a_resumed_training(tmp_path):
    """If the iterations step back, older lines from that iteration on are dropped."""
    lines = [{"iteration": i, "lr": lr} for i, lr in [(0, 1), (20, 2), (40, 3), (20, 4), (60, 5)]]
    metrics = write_metrics(tmp_path / "metrics.json", lines)
    assert report.read_metrics(metrics) == {"lr": [(0, 1), (20, 4), (60, 5)]}


def test_training_curves_show_the_metrics(tmp_path):
    """There is a panel for each metric in the file, and other values give another picture."""

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
    """Detects one box with the given score on each image."""

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


def test_ground_truth_and_detections_are_drawn(tiny_cfg, tmp_path):
    """In different colours. Only detections above the threshold are drawn."""
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


def test_drawing_restores_the_training_mode(tiny_cfg, tmp_path):
    """The model is in eval mode while it detects, once for each image."""
    training, evaluating = Detector(0.9).train(), Detector(0.9).eval()
    for model in (training, evaluating):
        report.draw_detections(tiny_cfg, model, tmp_path / "a.png")
    assert training.modes == evaluating.modes == [False] * 4
    assert training.training and not evaluating.training


def test_number_of_images_is_limited(tiny_cfg, tmp_path):
    """To ``num_images``."""
    model = Detector(0.9)
    report.draw_detections(tiny_cfg, model, tmp_path / "a.png", num_images=2)
    assert len(model.modes) == 2


def test_nothing_is_drawn_without_a_test_set(tiny_cfg, tmp_path):
    """DATASETS.TEST may be empty."""
    tiny_cfg.DATASETS.TEST = ()
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_metrics_of_one_and_of_several_test_sets(tiny_cfg):
    """Detectron2 nests the results of several sets. The AP of single classes is left out."""
    bbox = {"AP": 1.0, "AP50": 2.0, "AP-seven": 3.0}
    tiny_cfg.DATASETS.TEST = ("a",)
    metrics = {"AP": 1.0, "AP50": 2.0}
    assert report.metrics_by_dataset(tiny_cfg, {"bbox": bbox}) == {"a": metrics}
    assert report.metrics_by_dataset(tiny_cfg, {}) == {"a": {}}
    several = {"bbox": {"AP": 1.0}, "segm": {"AP": 2.0}, "speed": 3.0}
    assert report.metrics_by_dataset(tiny_cfg, several) == {
        "a": {"bbox AP": 1.0, "segm AP": 2.0, "speed": 3.0}
    }
    tiny_cfg.DATASETS.TEST = ("a", "b")
    results = {"a": {"bbox": bbox}, "b": {}}
    assert report.metrics_by_dataset(tiny_cfg, results) == {"a": metrics, "b": {}}


def test_table_of_results(tiny_cfg, log):
    """A row for each test set; nothing if there are no metrics."""
    tiny_cfg.DATASETS.TEST = ("a", "b")
    report.log_results(tiny_cfg, {"a": {}, "b": {}})
    assert log.messages == []
    report.log_results(tiny_cfg, {"a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}})
    (text,) = log.messages
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["|", "|", "AP", "|"],
        ["|:---|------:|"],
        ["|", "a", "|", "1.000", "|"],
        ["|", "b", "|", "2.000", "|"],
    ]
