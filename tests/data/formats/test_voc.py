"""Pascal VOC: equal to Detectron2's reader and to hotcoco's, where those are right."""

import hotcoco
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from pycocotools.coco import COCO


def obj(name="car", box=(1, 1, 100, 80), more=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object>\n<name>{name}</name>{more}<bndbox>{inner}</bndbox></object>\n"


SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def voc(*objects, size=SIZE, filename="a.jpg", head=""):
    text = "".join(objects)
    return f"{head}<annotation>\n<filename>{filename}</filename>\n{size}\n{text}</annotation>"


@pytest.fixture
def folder(write, tmp_path):
    write("v/Annotations/a.xml", voc(obj("dog", (9, 20, 50, 60.5)), obj("car")))
    write(
        "v/Annotations/b.xml",
        voc(obj("cat", (2, 3, 4, 5), "<difficult>1</difficult>"), filename="b.jpg"),
    )
    write("v/Annotations/c.xml", voc(filename="no.jpg"))
    for name in "abc":
        write(f"v/JPEGImages/{name}.jpg", (100, 80))
    write("v/ImageSets/Main/train.txt", "a\r\n\r\nb\r\n")
    write("v/ImageSets/Main/val.txt", "c\n")
    write("v/ImageSets/Main/car_train.txt", "a  1\nb -1\n")
    return tmp_path / "v"


def test_boxes_are_those_of_detectron2(folder, load):
    classes, images = load("voc:v:train")
    assert classes == ["car", "cat", "dog"]
    expected = load_voc_instances(str(folder), "train", classes)
    assert len(expected) == len(images) == 2
    for record in expected:
        _, _, boxes = images[f"v/JPEGImages/{record['image_id']}.jpg"]
        found = [
            (k, BoxMode.convert(list(b), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)) for k, b, _ in boxes
        ]
        assert found == [(a["category_id"], a["bbox"]) for a in record["annotations"]]


def test_whole_folder_is_what_hotcoco_reads(folder, load):
    load("voc:v")
    with_hotcoco = hotcoco.COCO.from_voc(str(folder)).dataset
    ours = COCO(MetadataCatalog.get("voc:v").json_file).dataset
    assert with_hotcoco["images"][2].pop("file_name") == "no.jpg"  # it trusts <filename>
    assert ours["images"][2].pop("file_name") == "c.jpg"
    for key in ("images", "annotations", "categories"):
        assert ours[key] == with_hotcoco[key]


def test_splits_number_the_classes_alike(folder, load):
    """Also a split without a box, and a list of one class."""
    assert load("voc:v:val") == (["car", "cat", "dog"], {"v/JPEGImages/c.jpg": (100, 80, [])})
    assert load("voc:v:car_train") == load("voc:v:train")


def test_difficult_objects_are_crowds(folder, load):
    _, images = load("voc:v")
    assert images["v/JPEGImages/b.jpg"][2] == [(1, (1.0, 2.0, 3.0, 3.0), 1)]


def test_labels_txt_gives_the_order(folder, load, write, fault):
    write("v/labels.txt", "\ufeffdog\r\ncat\r\n\r\ncar\r\nbus\r\n")
    assert load("voc:v")[0] == ["dog", "cat", "car", "bus"]
    write("v/labels.txt", "dog\ncat\n")
    assert fault("voc:v").endswith("a.xml, line 6: the class 'car' is not in " + fault_file(folder))


def fault_file(folder):
    return f"{folder}/labels.txt (did you mean 'cat'?)"


@pytest.mark.parametrize(
    ("file", "text", "encoding"),
    [
        ("a.xml", voc(obj("Straße &amp; 犬")), "utf-8"),
        ("a.xml", voc(obj("Straße &amp; 犬")), "utf-8-sig"),
        ("a.XML", voc(obj(" Straße &amp; 犬\n"), filename="ä ö.jpg"), "utf-16"),
        ("a.xml", voc(obj("Straße &amp; &#29356;"), head="<?xml version='1.0' encoding='latin1'?>"),
         "latin1"),
    ],
    ids=["UTF-8", "mark", "UTF-16", "latin1"],
)  # fmt: skip
def test_names_in_every_encoding(write, load, file, text, encoding):
    write(f"ö 1/Annotations/{file}", text.encode(encoding))
    write("ö 1/JPEGImages/a.JPG", (100, 80))
    classes, images = load("voc:ö 1")
    assert classes == ["Straße & 犬"]
    assert images == {"ö 1/JPEGImages/a.JPG": (100, 80, [(0, (0.0, 0.0, 100.0, 80.0), 0)])}


def test_labelimgs_folder(write, load):
    """XML beside images, in folders; the image is upright; <filename> where no image has the name.

    Boxes outside the image stay, as in a COCO file; xmin 0 stays 0.
    """
    none = "<size><width>0</width></size>"
    write("f/s/a.xml", voc(obj(box=(0, 0, 120, 9)), size=none, filename="C:\\x\\z.jpg"))
    write("f/s/z.jpg", (80, 100, 6))
    _, images = load("voc:f")
    assert images == {"f/s/z.jpg": (100, 80, [(0, (0.0, 0.0, 120.0, 9.0), 0)])}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (voc(obj(), obj(box=(1, 1, "x", 3))), "a.xml, line 6: the object 'car' has the xmax 'x'"),
        (voc(obj(box=(50, 1, 10, 3))), "a.xml, line 4: the object 'car' has 50, 1, 10, 3: xmax or"),
        (voc(obj(box=(1, 1, "nan", 3))), "a.xml, line 4: the object 'car' has the xmax 'nan'"),
        (voc(obj(" ")), "a.xml, line 4: the object has no <name>"),
        (voc("<object><name>car</name></object>"), "line 4: the object 'car' has no <bndbox>"),
        (voc()[:-5], "a.xml, line 4: is not XML: unclosed token"),
        ("", "a.xml, line 1: is not XML: no element found"),
        ("<html/>", "a.xml, line 1: <html> is not VOC's <annotation>"),
        (voc(obj(), size="", filename="no.jpg"), "a.xml: there is no image "),
        (voc(), "Annotations: no file has an object: name the classes in labels.txt"),
    ],
)  # fmt: skip
def test_fault_names_file_and_line(write, fault, text, expected):
    write("v/Annotations/a.xml", text)
    assert expected in fault("voc:v")


def test_missing_folders_and_splits(folder, fault, write):
    assert "there is no folder" in fault("voc:no")
    assert "split: unknown 'tran' (did you mean 'train'" in fault("voc:v:tran")
    write("v/ImageSets/Main/bad.txt", "a\nz\n")
    assert "bad.txt, line 2: there is no z.xml" in fault("voc:v:bad")
    write("empty/a.txt", "")
    assert "has no XML files" in fault("voc:empty")
