"""YOLO: equal to hotcoco's reader where that is right, and Ultralytics' layouts."""

import hotcoco
import pytest


@pytest.fixture
def folder(write, tmp_path):
    write("y/data.yaml", "path: .\ntrain: images/train\nval: [images/val]\nnames: [car, dog]\n")
    write("y/images/train/a.jpg", (100, 80))
    write("y/labels/train/a.txt", "0 0.51 0.5 0.3 0.5\n1 0.9 0.5 0.4 0.25\n")
    write("y/images/val/s/b.JPG", (80, 100, 6))
    write("y/labels/val/s/b.txt", b"\xef\xbb\xbf1 0.5 0.5 0.5 0.25\r\n\r\n")
    write("y/images/val/c.jpg", (10, 10))
    return tmp_path / "y"


def test_boxes_are_those_of_hotcoco(folder, load, write):
    classes, images = load("yolo:y/data.yaml:train")
    write("y/labels/train/data.yaml", "names: [car, dog]")
    expected = hotcoco.COCO.from_yolo(str(folder / "labels/train"), str(folder / "images/train"))
    assert classes == [c["name"] for c in expected.dataset["categories"]]
    ((width, height, boxes),) = images.values()
    (image,) = expected.dataset["images"]
    assert (width, height) == (image["width"], image["height"])
    for (category, box, _), annotation in zip(boxes, expected.dataset["annotations"], strict=True):
        assert category + 1 == annotation["category_id"]
        assert box == pytest.approx(annotation["bbox"], abs=1e-9)


def test_folders_turned_images_and_images_without_labels(folder, load):
    """An upper-case ending, a folder within the split, a byte-order mark, CRLF, blank lines."""
    _, images = load("yolo:y:val")
    assert images == {
        "y/images/val/c.jpg": (10, 10, []),
        "y/images/val/s/b.JPG": (100, 80, [(1, (25.0, 30.0, 50.0, 20.0), 0)]),
    }


def test_without_a_split_it_is_train(folder, load):
    assert load("yolo:y/data.yaml") == load("yolo:y:train")


@pytest.mark.parametrize(
    "names", ["{1: 犬, 0: no}", "\n  0: no\n  1: 犬", "[no, 犬]\nnc: 2", "\n- no\n- 犬"]
)
def test_names_as_list_or_mapping(folder, load, write, names):
    write("y/data.yaml", f"train: images/train\nnames: {names}\n")
    assert load("yolo:y")[0] == ["no", "犬"]


def test_lists_of_images(folder, load, write):
    """Relative to the list or to the root, or absolute; a repeated line counts once."""
    lines = ["./images/train/a.jpg", "", f"{folder}/images/val/c.jpg", "images/train/a.jpg"]
    write("y/all.txt", "\r\n".join(lines))
    write("y/data.yaml", "train: [all.txt, images/val]\nnames: [car, dog]")
    _, images = load("yolo:y")
    assert list(images) == [
        f"y/images/{name}" for name in ("train/a.jpg", "val/c.jpg", "val/s/b.JPG")
    ]


def test_roboflows_paths(folder, load, write):
    """It writes ../train/images though train lies beside data.yaml."""
    write("r/train/images/a.jpg", (100, 80))
    write("r/train/labels/a.txt", "0 .5 .5 .5 .5")
    write("r/data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['car']")
    assert list(load("yolo:r/data.yaml")[1]) == ["r/train/images/a.jpg"]


@pytest.mark.parametrize(
    ("line", "extra", "box"),
    [
        ("0 .1 .2 .5 .25 .3 .75", "", (10, 16, 40, 44)),
        ("0 .1 .2 .5 .2 .5 .6 .1 .6", "", (10, 16, 40, 32)),
        ("0 .5 .5 .2 .5 .1 .1 2 .9 .9 1", "kpt_shape: [2, 3]", (40, 20, 20, 40)),
    ],
    ids=["segment", "oriented", "keypoints"],
)
def test_extent_of_polygons(folder, load, write, line, extra, box):
    write("y/labels/train/a.txt", line)
    write("y/data.yaml", f"train: images/train\nnames: [car, dog]\n{extra}")
    ((_, _, [(_, found, _)]),) = load("yolo:y")[1].values()
    assert found == pytest.approx(box)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2 .5 .5 .1 .1", "class 2 is not one of 0 to 1"),
        ("-1 .5 .5 .1 .1", "class -1 is not"),
        ("0.5 .5 .5 .1 .1", "class 0.5 is not"),
        ("0 .5 .5 .1", "4 numbers are neither a box"),
        ("0 .5 .5 .1 .1 .9", "6 numbers are neither a box"),
        ("0 nan .5 .1 .1", "'nan' is no number"),
        ("car .5 .5 .1 .1", "'car' is no number"),
        ("0 50 50 10 10", "the box lies far outside the image"),
        ("0 .5 .5 -.1 .1", "the box has a negative width"),
        (b"0 .5 .5 .1 .1 \xff", "is not UTF-8 (byte 0xff)"),
    ],
)
def test_fault_of_a_label_names_file_and_line(folder, fault, write, line, expected):
    first = "0 .5 .5 .1 .1\n"
    text = first.encode() + line if isinstance(line, bytes) else first + line
    write("y/labels/train/a.txt", text)
    assert f"labels/train/a.txt, line 2: {expected}" in fault("yolo:y")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [", "data.yaml, line 1: is not YAML"),
        ("train: images/train", "has no names"),
        ("train: images/train\nnames: {1: car}", "must number the classes from 0 to 0, got 1"),
        ("train: images/train\nnames: [a]\nnc: 2", "nc is 2, but there are 1 names"),
        ("train: no\nnames: [a]", "data.yaml: train: there is no "),
        ("val: images/val\nnames: [a]", "split: unknown 'train'; known: val"),
        ("train: labels\nnames: [a]", "train has no images: labels"),
    ],
)
def test_fault_of_data_yaml(folder, fault, write, text, expected):
    write("y/data.yaml", text)
    assert expected in fault("yolo:y/data.yaml")


def test_missing_and_broken_images(folder, fault, write):
    write("y/list.txt", "images/train/a.jpg\nimages/no.jpg")
    write("y/data.yaml", "train: list.txt\nnames: [car, dog]")
    assert "list.txt, line 2: there is no image" in fault("yolo:y")
    write("y/images/no.jpg", b"no")
    assert "no.jpg: it is no image" in fault("yolo:y")
    write("n/images/a.jpg", (9, 9))
    write("n/data.yaml", "train: images\nnames: [car]")
    assert "no image has labels: those of " in fault("yolo:n")
