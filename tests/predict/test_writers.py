"""Output files: their names, and what is there after an error."""

import csv
import json
import os
import sys

import cv2
import numpy as np
import pytest

from retina_plugin.errors import ConfigError
from retina_plugin.predict import Predictions
from retina_plugin.predict.writers import CsvFile, FileNames, ImageIds, JsonList, write_image

SIZE = (64, 64)


def test_names_differ_on_every_file_system():
    names = FileNames()
    inputs = ["a/x.png", "b/x.png", "c/X.png", "x_2.png", "d/x.png", "x.tif", "x.jpg"]
    expected = ["x.png", "x_2.png", "X_3.png", "x_2_2.png", "x_4.png", "x.jpg", "x_2.jpg"]
    assert [names.image(path, SIZE) for path in inputs] == expected


def test_each_of_many_files_of_one_name_takes_the_same_steps():
    """Counted in calls: to count from 1 for each file took an hour for 100,000."""
    names, steps = FileNames(), [0]

    def count(frame, event, function):
        steps[0] += event == "c_call"

    def steps_of(number):
        steps[0] = 0
        sys.setprofile(count)
        found = [names.image("rgb.png", SIZE) for _ in range(number)]
        sys.setprofile(None)
        assert len(set(found)) == number
        return steps[0]

    first, second = steps_of(300), steps_of(300)
    assert second < 1.1 * first and names.image("rgb.png", SIZE) == "rgb_601.png"


@pytest.mark.parametrize("letter", ["a", "я", "漢"])
def test_long_names_are_shortened(tmp_path, letter):
    names = FileNames()
    name = letter * (251 // len(letter.encode())) + ".png"
    written = [names.image(name, SIZE) for _ in range(2)]
    for drawn in written:
        write_image(tmp_path / drawn, np.zeros((4, 4, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == sorted(written)
    assert all(drawn.startswith(letter * 60) and drawn.endswith(".png") for drawn in written)
    assert names.video(name).endswith(f"{letter}.mp4")


@pytest.mark.parametrize(
    ("width", "name", "expected"),
    [
        (65_500, "a.tif", "a.jpg"),
        (65_501, "a.tif", "a.png"),
        (65_501, "a.JPEG", "a.png"),
        (65_501, "a.bmp", "a.bmp"),
        (16_383, "a.webp", "a.webp"),
        (16_384, "a.webp", "a.jpg"),
    ],
)
def test_wide_image_gets_a_format_that_can_have_it(tmp_path, width, name, expected):
    drawn = FileNames().image(name, (2, width))
    assert drawn == expected
    write_image(tmp_path / drawn, np.zeros((2, width, 3), np.uint8))
    assert cv2.imread(str(tmp_path / drawn)).shape == (2, width, 3)


def test_image_that_cannot_be_written_is_no_error_of_the_disk(tmp_path):
    with pytest.raises(ConfigError, match="cannot encode 1000001x1 pixels as .png"):
        write_image(tmp_path / "a.png", np.zeros((1, 1_000_001, 3), np.uint8))
    with pytest.raises(ConfigError, match="cannot write .*File name too long"):
        write_image(tmp_path / f"{'a' * 252}.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(FileNotFoundError):
        write_image(tmp_path / "no" / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert not os.listdir(tmp_path)


def test_error_leaves_the_file_of_an_earlier_run_and_what_was_found(tmp_path):
    for name in ("a.json", "a.csv"):
        (tmp_path / name).write_text("old")
    with (
        pytest.raises(OSError, match="disk"),
        JsonList(tmp_path / "a.json") as results,
        CsvFile(tmp_path / "a.csv"),
    ):
        results.write([{"a": 1}])
        raise OSError("disk")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "a.csv").read_text() == "old"
    assert json.loads((tmp_path / ".a.json.partial").read_text()) == [{"a": 1}]
    assert (tmp_path / ".a.csv.partial").read_text().startswith("image_id,")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["b.png", "ids/1.png", "ids/2.png", "ids/3.png"], [4, 1, 2, 3]),
        (["b.png", "0002.png", "c.png", "a/2.png", "d.png", "0.png"], [1, 2, 3, 4, 5, 0]),
        (["000000000139.jpg", "a.png", "139.jpg", "²3.png"], [139, 1, 2, 3]),
    ],
)
def test_number_in_a_name_is_the_id_whatever_comes_before(files, expected):
    """Frames go on behind them."""
    ids = ImageIds(files)
    assert [ids.of(file) for file in files] == expected
    rest = [ids.of(None) for _ in range(3)]
    assert len({*rest, *expected}) == len(files) + 3
    assert rest == list(range(rest[0], rest[0] + 3))


def test_ids_of_images_that_were_not_known_differ():
    ids = ImageIds()
    assert [ids.of(file) for file in ("b.png", "1.png", "2.png", "3.png")] == [1, 2, 3, 4]


def test_file_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    found = Predictions(np.ones((1, 4), np.float32), np.ones(1), np.zeros(1, int), SIZE, ("a",))
    entries = [{**entry, "file_name": name} for entry in found.to_coco(1)]
    with CsvFile(tmp_path / "a.csv") as table, JsonList(tmp_path / "a.json") as results:
        table.write(found, entries)
        results.write(entries)
    (row,) = csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines())
    assert row["file_name"] == "caf\\udce9.png"
    assert json.loads((tmp_path / "a.json").read_text())[0]["file_name"] == name
