"""Pictures and tables of a training: read, drawn, and looked at."""

import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
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
    """If the losses step back, older lines from that iteration on are dropped."""
    points = [(0, 1), (20, 2), (40, 3), (20, 4), (60, 5)]
    lines = [{"iteration": i, "total_loss": loss} for i, loss in points]
    lines.insert(3, {"iteration": 39, "bbox/AP": 1.0})
    metrics = write_metrics(tmp_path / "metrics.json", lines)
    assert report.read_metrics(metrics) == {"total_loss": [(0, 1), (20, 4), (60, 5)]}


def test_late_evaluation_is_no_restart(tmp_path):
    """Detectron2 writes an evaluation after newer losses: MAX_ITER 100, EVAL_PERIOD 30."""
    losses = [{"iteration": i, "total_loss": i} for i in (19, 39, 59, 79, 99)]
    tested = [{"iteration": i, "validation_loss": i} for i in (29, 59, 89)]
    lines = [losses[0], losses[1], tested[0], losses[2], losses[3], losses[4], tested[2], tested[1]]
    metrics = write_metrics(tmp_path / "metrics.json", lines)
    assert report.read_metrics(metrics) == {
        "total_loss": [(i, i) for i in (19, 39, 59, 79, 99)],
        "validation_loss": [(i, i) for i in (29, 59, 89)],
    }


def test_torn_lines_of_metrics_are_left_out(tmp_path):
    """A killed process leaves half a line: no JSON, or JSON that is no record."""
    path = tmp_path / "metrics.json"
    good = '{"iteration": 1, "lr": 2}'
    path.write_bytes(b"\n".join([good.encode(), b'{"iterat', b"12", b"{}", b"[]", b"\xff\xfe"]))
    assert report.read_metrics(path) == {"lr": [(1, 2)]}


@pytest.mark.parametrize("text", [None, "", '{"iteration": 1, "eta": 2}'])
def test_curves_of_nothing_are_a_warning(tmp_path, log, text):
    """The file is missing, is empty, or has nothing that is drawn."""
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    report.draw_training_curves(tmp_path / "metrics.json", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    (record,) = log.records
    assert record.levelname == "WARNING" and str(tmp_path / "a.png") in record.getMessage()


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


@pytest.fixture
def test_set(tiny_cfg):
    """``test_set(records)`` makes them the first test set."""

    def register(records, **metadata):
        DatasetCatalog.register("test_$a_$b", lambda: records)
        MetadataCatalog.get("test_$a_$b").set(**metadata)
        tiny_cfg.DATASETS.TEST = ("test_$a_$b",)

    yield register
    DatasetCatalog.remove("test_$a_$b")
    MetadataCatalog.pop("test_$a_$b")


@pytest.mark.parametrize(
    "extra",
    [
        {"segmentation": []},
        {"segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"segmentation": {"size": [64, 64], "counts": "abc"}},
        {"keypoints": [1, 1, 2]},
    ],
)
def test_picture_reads_boxes_only(tiny_cfg, tmp_path, test_set, log, extra):
    """Some annotations have masks or keypoints, others do not."""
    records = DatasetCatalog.get("digits_scenes_val")
    with_extra = [dict(r, annotations=[a | extra for a in r["annotations"]]) for r in records[:1]]
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "plain.png")
    test_set(with_extra + records[1:])
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert not [r for r in log.records if r.levelname == "WARNING"]
    plain, drawn = colours(tmp_path / "plain.png"), colours(tmp_path / "a.png")
    assert count(drawn, LIME) == count(plain, LIME) > 0


def test_picture_that_cannot_be_drawn_is_a_warning(tiny_cfg, tmp_path, test_set, log):
    """The image is not there. No figure stays open."""
    figures = plt.get_fignums()
    test_set([{"file_name": str(tmp_path / "no.png"), "height": 9, "width": 9, "image_id": 1}])
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    (record,) = [r for r in log.records if r.levelname == "WARNING"]
    assert "a.png is not drawn" in record.getMessage() and "no.png" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert plt.get_fignums() == figures


def test_dollars_in_names_are_shown(tiny_cfg, tmp_path, test_set, log):
    """Of the dataset, the file and the class. Two of them would enclose a formula."""
    record = DatasetCatalog.get("digits_scenes_val")[0]
    file = tmp_path / r"a$\frac$b.png"
    shutil.copy(record["file_name"], file)
    test_set([record | {"file_name": str(file)}], thing_classes=[r"a$\frac$b"] * 10)
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert not [r for r in log.records if r.levelname == "WARNING"]
    assert count(colours(tmp_path / "a.png"), ORANGE) > 0
    lines = [{"iteration": i, r"a$\frac$b/bbox/AP": 2.0 + i} for i in range(3)]
    write_metrics(tmp_path / "metrics.json", lines)
    report.draw_training_curves(tmp_path / "metrics.json", tmp_path / "b.png")
    assert (tmp_path / "b.png").exists()


def test_large_images_are_shrunk_before_drawing(tiny_cfg, tmp_path, test_set, monkeypatch):
    """Boxes too: they lie where they lay."""
    drawn = []
    draw = report.Visualizer.overlay_instances

    def spy(self, **arguments):
        drawn.append((self.img.shape, np.asarray(arguments["boxes"]).round().tolist()))
        return draw(self, **arguments)

    monkeypatch.setattr(report.Visualizer, "overlay_instances", spy)
    Image.new("RGB", (1440, 2880)).save(tmp_path / "large.png")
    record = {"file_name": str(tmp_path / "large.png"), "height": 2880, "width": 1440}
    box = {"bbox": [400, 800, 400, 800], "bbox_mode": 1, "category_id": 0}
    test_set([record | {"image_id": 1, "annotations": [box]}])
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert [d[0] for d in drawn] == [(720, 360, 3)] * 2
    assert drawn[0][1] == [[100, 200, 200, 400]] and drawn[1][1] == [[1, 1, 15, 15]]


def test_number_of_drawn_boxes_is_limited(tiny_cfg, tmp_path, test_set, monkeypatch):
    """The title says so."""
    counts, titles = [], []
    draw, title = report.Visualizer.overlay_instances, plt.Axes.set_title
    monkeypatch.setattr(
        report.Visualizer,
        "overlay_instances",
        lambda self, **a: counts.append(len(a["boxes"])) or draw(self, **a),
    )
    monkeypatch.setattr(
        plt.Axes, "set_title", lambda self, text, **a: titles.append(text) or title(self, text, **a)
    )
    record = DatasetCatalog.get("digits_scenes_val")[0]
    test_set([record | {"annotations": record["annotations"][:1] * 50_000}])
    report.draw_detections(tiny_cfg, Detector(0.9), tmp_path / "a.png")
    assert counts == [200, 1]
    assert titles[0].endswith(" (200 of 50000 true boxes)")


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
