"""``retina predict``: what it writes, what it leaves out, how it ends."""

import csv
import json
import os
import signal
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from retina_plugin.cli import main
from retina_plugin.cli.predict import _names, _Run, _split_overrides, argument_parser
from retina_plugin.errors import ConfigError
from retina_plugin.predict import Predictions
from retina_plugin.predict import video as videos
from retina_plugin.predict.video import VideoWriter, read_video


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def retina(tiny_cfg, tmp_path, monkeypatch):
    """retina(*words) -> exit status of ``retina predict`` on a random model, in a new folder."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    model.head.cls_score.bias.data.fill_(-2.0)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(tiny_cfg.dump())
    monkeypatch.chdir(tmp_path)

    def run(*words, score="0.2"):
        options = ["--config-file", "c.yaml", "--weights", "w.pth", "--score", score]
        try:
            main(["predict", *options, "--output", "out", *words])
        except SystemExit as end:
            return end.code
        return 0

    return run


def results():
    with open("out/predictions.json", encoding="utf-8") as file:
        return json.load(file)


def write_video(path, size=(48, 64), number=5, rate=10):
    with VideoWriter(path, Fraction(rate)) as writer:
        for i in range(number):
            writer.write(noise(*size, seed=i))


def test_everything_is_written_and_bad_files_are_named(retina, tmp_path, capfd):
    """Same names of two folders, a damaged file, a missing one, a pattern and a folder."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(f"{folder}/12.png", noise(64, 64))
    cv2.imwrite("b/ü.png", noise(50, 70))
    (tmp_path / "b" / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    assert retina("a", "b/*.*", "missing.jpg", "--csv", "--batch", "2") == 1
    said = capfd.readouterr().err
    assert "b/bad.jpg" in said and "missing.jpg" in said and "2 inputs were left out" in said
    assert sorted(os.listdir("out/images")) == ["12.png", "12_2.png", "ü.png"]
    assert cv2.imread("out/images/ü.png").shape == (50, 70, 3)
    found = results()
    assert {x["file_name"] for x in found} == {"a/12.png", "b/12.png", "b/ü.png"}
    assert {x["image_id"] for x in found} == {12, 1, 2}
    assert all(x["score"] >= 0.2 and x["category_name"] in "0123456789" for x in found)
    with open("out/predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["score"]) for r in rows] == [x["score"] for x in found]
    assert not [name for name in os.listdir("out") if "partial" in name]


def test_results_load_in_pycocotools(retina, tmp_path, tiny_digits):
    """Image ids by COCO's names, categories by the dataset: the ids of its annotation file."""
    assert retina(str(tiny_digits / "val"), "--no-images") == 0
    truth = COCO(str(tiny_digits / "val.json"))
    loaded = truth.loadRes("out/predictions.json")
    names = {x["id"]: x["name"] for x in truth.loadCats(truth.getCatIds())}
    files = {x["id"]: os.path.basename(x["file_name"]) for x in truth.imgs.values()}
    for x in loaded.anns.values():
        assert names[x["category_id"]] == x["category_name"]
        assert files[x["image_id"]] == os.path.basename(x["file_name"])
    assert not os.path.exists("out/images")


def test_number_in_a_files_name_is_its_id_whatever_comes_before(retina, tmp_path):
    (tmp_path / "ids").mkdir()
    for seed, name in enumerate(("b.png", "ids/1.png", "ids/2.png", "ids/3.png")):
        cv2.imwrite(name, noise(64, 64, seed))
    write_video(tmp_path / "clip.mp4", number=2)
    assert retina("clip.mp4", "b.png", "ids", "--no-images") == 0
    ids = {(x["file_name"], x.get("frame")): x["image_id"] for x in results()}
    assert ids == {
        ("b.png", None): 4,
        **{(f"ids/{k}.png", None): k for k in (1, 2, 3)},
        **{("clip.mp4", k): 5 + k for k in (0, 1)},
    }


@pytest.mark.parametrize("library", ["PyAV", "OpenCV"])
@pytest.mark.parametrize("size", [(48, 64), (49, 63)])
def test_video_keeps_rate_length_and_size(retina, tmp_path, monkeypatch, library, size):
    if library == "PyAV":
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(videos, "pyav", lambda: None)
    write_video(tmp_path / "clip.mp4", size)
    assert retina("clip.mp4") == 0
    assert os.listdir("out/videos") == ["clip.mp4"]
    drawn = read_video("out/videos/clip.mp4")
    frames = list(drawn.frames())
    assert drawn.rate == 10 and len(frames) == 5
    assert frames[0].pixels.shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert {x["frame"] for x in results()} == set(range(5))
    assert len({x["image_id"] for x in results()}) == 5


@pytest.mark.parametrize("library", ["PyAV", "OpenCV"])
def test_colon_in_a_videos_path_is_no_url(retina, monkeypatch, library):
    """FFmpeg's protocol is what stands before a colon."""
    if library == "PyAV":
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(videos, "pyav", lambda: None)
    write_video(Path("12:30:00.mp4"))
    assert retina("12:30:00.mp4", "--output", "out:1") == 0
    assert os.listdir("out:1/videos") == ["12:30:00.mp4"]
    assert len(list(read_video("out:1/videos/12:30:00.mp4").frames())) == 5
    entries = json.loads(Path("out:1/predictions.json").read_text())
    assert {x["file_name"] for x in entries} == {"12:30:00.mp4"}


@pytest.mark.usefixtures("retina")
def test_video_times_and_rotation():
    """A changing rate stays, and a phone's picture is turned upright."""
    av = pytest.importorskip("av")
    with av.open("in.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        stream.set_display_rotation(90)
        for time in (0, 10, 40, 50):
            frame = av.VideoFrame.from_ndarray(noise(48, 64), format="bgr24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = read_video("in.mp4")
    frames = list(video.frames())
    assert frames[0].pixels.shape == (64, 48, 3)
    with VideoWriter(Path("out.mp4"), video.rate) as writer:
        for frame in frames:
            writer.write(frame.pixels, frame.seconds)
    again = [frame.seconds for frame in read_video("out.mp4").frames()]
    np.testing.assert_allclose(again, [0, 0.1, 0.4, 0.5], atol=0.01)


def test_damaged_video_and_missing_webcam_are_left_out(retina, tmp_path, capfd):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    cv2.imwrite("a.png", noise(64, 64))
    assert retina("bad.mp4", "97", "a.png") == 1
    said = capfd.readouterr().err
    assert "bad.mp4" in said and "webcam 97" in said and len(results()) > 0


def test_video_without_decoder_is_left_out(retina, capfd):
    pytest.importorskip("av")
    write_video(Path("good.mp4"))
    data = Path("good.mp4").read_bytes()
    Path("codec.mp4").write_bytes(data.replace(b"avc1", b"zzz1").replace(b"mp4v", b"zzz1"))
    assert retina("codec.mp4", "good.mp4") == 1
    assert "left out: PyAV has no decoder for the video codec.mp4" in capfd.readouterr().err
    assert {x["file_name"] for x in results()} == {"good.mp4"}
    assert os.listdir("out/videos") == ["good.mp4"]


def test_video_that_cannot_be_encoded_is_left_out(tmp_path, monkeypatch, capfd):
    """H.264 has no frames of this width."""
    av = pytest.importorskip("av")
    if "libx264" not in av.codecs_available:
        pytest.skip("PyAV without libx264")
    monkeypatch.chdir(tmp_path)
    frames = [videos.Frame(noise(16, 16_400), "wide.avi", 0, 0.0)]
    opened = videos.Video(Fraction(10), 1, iter(frames))
    monkeypatch.setattr("retina_plugin.cli.predict.read_video", lambda path: opened)
    run = _Run(argument_parser().parse_args(["x", "--output", "out"]))
    run(Fake(size=(16, 16_400)), ["wide.avi"])
    assert run.failures == 1
    assert "left out: wide.avi: cannot write the video out/videos/wide" in capfd.readouterr().err
    assert os.listdir("out/videos") == [] and len(results()) == 3


def test_image_that_cannot_be_drawn_is_named_and_the_run_goes_on(retina, capfd):
    """The path of the first drawing is too long for the system. Its detections are written."""
    output = "/".join(["d" * 200] * 18 + ["e" * 230])
    first = f"{'a' * 250}.png"
    for name in (first, "b.png"):
        cv2.imwrite(name, noise(64, 64))
    assert retina(first, "b.png", "--output", output) == 1
    assert f"left out: {first} is not drawn: cannot write " in capfd.readouterr().err
    assert os.listdir(f"{output}/images") == ["b.png"]
    names = {x["file_name"] for x in json.loads(Path(output, "predictions.json").read_text())}
    assert names == {first, "b.png"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.jpg"], "nothing to detect in"),
        (["a.png", "--classes", "seven"], "no class 'seven'"),
        (["a.png", "--tile", "1"], "tile 1"),
        (["a.png", "MODEL.RETINANET.SCORE", "1"], "MODEL.RETINANET.SCORE"),
        (["a.png", "--output", "a.png"], "--output"),
    ],
)
def test_mistake_is_one_line(retina, words, said):
    cv2.imwrite("a.png", noise(64, 64))
    assert said in str(retina(*words)) and "\n" not in str(retina(*words))


def test_inputs_are_never_replaced_and_patterns_pass_over_the_output(retina, capfd):
    Path("out/images").mkdir(parents=True)
    cv2.imwrite("out/images/a.png", noise(40, 40))
    before = Path("out/images/a.png").read_bytes()
    assert "--output" in str(retina("out/images")) and "--output" in str(retina("out/images/a.png"))
    assert Path("out/images/a.png").read_bytes() == before
    assert retina("out/images", "--no-images") == 0  # nothing is drawn
    cv2.imwrite("b.png", noise(40, 40))
    assert retina("**/*.png", "./b.png", "missing") == 1
    assert {x["file_name"] for x in results()} == {"b.png"}
    assert "\n1 input was left out" in capfd.readouterr().err


def test_class_name_with_a_comma(retina):
    assert _names('car, "traffic light, red" ,a') == ["car", "traffic light, red", "a"]
    cv2.imwrite("b.png", noise(40, 40))
    assert "no class ''" in str(retina("b.png", "--classes", ""))


@pytest.mark.parametrize("text", ["car\nbus, van\n", "car,\r\n\n bus,van", "car,bus,van"])
def test_class_names_in_lines(text):
    assert _names(text) == ["car", "bus", "van"]


def test_endless_class_name_is_one_line():
    with pytest.raises(ConfigError, match="--classes: field larger than"):
        _names("a" * 200_000)


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["IMG_*.JPG", "DSC_*.JPG"], []),
        (["a.png", "TEST.*", "INPUT.*"], []),
        (["DSC_2.JPG", "IMG_9.JPG", "IMG_1.JPG"], []),
        (["a.png", "MODEL.DEVICE", "cpu", "TEST.MERGE", "wbf"], ["MODEL.DEVICE", "TEST.MERGE"]),
        (["IMG_9.JPG", "MODEL.NO", "1"], ["MODEL.NO"]),
    ],
)
def test_file_names_in_capitals_are_no_overrides(words, overrides):
    inputs, pairs = _split_overrides(words)
    assert inputs + pairs == words and pairs[::2] == overrides


def test_model_and_config_exclude_each_other(retina, capfd):
    assert retina("a.png", "--model", "x") == 2
    assert "--config-file and --weights, or --model" in capfd.readouterr().err


def test_overrides_and_classes(retina):
    cv2.imwrite("a.png", noise(64, 64))
    assert retina("a.png", "--classes", "3, 5", "TEST.DETECTIONS_PER_IMAGE", "40") == 0
    assert {x["category_name"] for x in results()} == {"3", "5"} and len(results()) <= 40


class Fake:
    """A predictor that finds the same in every frame of an endless or long source."""

    def __init__(self, number=None, at=None, size=(64, 64)):
        self.number, self.at, self.size = number, at, size

    def run(self, frames, on_error):
        boxes, scores = np.ones((3, 4), np.float32), np.ones(3, np.float32)
        for i, frame in enumerate(frames):
            if self.at is not None and i == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame, Predictions(boxes, scores, np.zeros(3, int), self.size, ("a",))


def test_interrupted_run_leaves_whole_files(tmp_path, monkeypatch):
    """Ctrl-C at the third image: the JSON and the table have the images before it."""
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.chdir(tmp_path)
    for i in range(9):
        cv2.imwrite(f"{i}.png", noise(64, 64))
    args = argument_parser().parse_args(["x", "--csv", "--output", "out"])
    run = _Run(args)
    before = signal.getsignal(signal.SIGINT)
    run(Fake(at=2), [f"{i}.png" for i in range(9)])
    assert run.stopped.is_set() and len(results()) == 3 * 3
    assert len(Path("out/predictions.csv").read_text().splitlines()) == 1 + 9
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """20,000 files: only their names and ids are kept, below 300 bytes each."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.png", noise(8, 8))
    peaks = []
    for number in (500, 4000):
        sources = ["a.png"] * number
        run = _Run(argument_parser().parse_args(["x", "--no-images", "--output", "out"]))
        tracemalloc.start()
        monkeypatch.setattr(
            "retina_plugin.cli.predict.read_frames",
            lambda names, failed: (videos.Frame(noise(8, 8), name) for name in names),
        )
        run(Fake(), sources)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 300 * 3500
    assert len(results()) == 12_000
