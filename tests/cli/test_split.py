"""``retina split``: the files, the counts, what to paste."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from retina_plugin.cli import main
from retina_plugin.data import register_datasets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9, "day": i % 2}
        for i in range(1, 11)
    ]
    box = {"image_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [{"id": 1, "category_id": 1, **box}, {"id": 2, "category_id": 2, **box}],
        "categories": [{"id": 1, "name": "Straße"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "my cars").mkdir()
    (tmp_path / "my cars" / "all.json").write_text(json.dumps(content))
    before = set(DatasetCatalog)
    yield tmp_path
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_both_files_and_the_next_step(folder, capsys):
    """The printed names load, with all classes in both; a class that is missing is said."""
    main(["split", "coco:my cars/all.json", "--output", "parts", "--val", "0.3"])
    printed = capsys.readouterr().out
    assert ["images", "7", "3"] in [line.split() for line in printed.splitlines()]
    (missing,) = {line.split()[1] for line in printed.splitlines() if "warning" in line}
    assert f"warning: {missing} has no box of the class 'Straße'" in printed
    names = [line.split('"')[1] for line in printed.splitlines()[-2:]]
    assert names == [f"coco:parts/{part}.json:my cars" for part in ("train", "val")]
    register_datasets(names)
    records = [DatasetCatalog.get(name) for name in names]
    assert [len(part) for part in records] == [7, 3]
    assert records[0][0]["file_name"].startswith(f"{folder}/my cars/")
    for name in names:
        assert MetadataCatalog.get(name).thing_classes == ["Straße", "b"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["coco:no.json"], "no.json"),
        (["cocoo:all.json"], "did you mean 'coco:all.json'?"),
        (["voc:no"], "there is no folder"),
        (["coco:my cars/all.json", "--group", "dya"], "has no 'dya' (did you mean 'day'"),
        (["coco:my cars/all.json", "--group-pattern", "("], "is no regular expression"),
        (["coco:my cars/all.json", "--val", "2"], "between 0 and 1"),
        (["coco:my cars/all.json", "--output", "my cars/all.json"], "cannot write"),
    ],
)
def test_what_cannot_be_split_is_one_line(folder, arguments, expected):
    with pytest.raises(SystemExit) as end:
        main(["split", "--output", "parts", *arguments])
    assert expected in end.value.code and "\n" not in end.value.code
    assert not (folder / "parts").exists()


@pytest.mark.parametrize("link", ["none", "symlink", "hard link", "parent"])
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_dataset_does_not_replace_its_own_file(folder, link, part, overwrite):
    """Nothing is written, and the line does not suggest --overwrite."""
    source = (folder / "my cars" / "all.json").rename(folder / f"{part}.json")
    before = source.read_bytes()
    (folder / "out").mkdir()
    output = folder / "out" if link.endswith("link") else folder
    if link == "symlink":
        (output / source.name).symlink_to(source)
    elif link == "hard link":
        (output / source.name).hardlink_to(source)
    elif link == "parent":
        (folder / "down").symlink_to(folder)
        output = folder / "down"
    other = output / {"train": "val.json", "val": "train.json"}[part]
    other.write_text("of an earlier split")
    there = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["split", f"coco:{part}.json:my cars", "--output", str(output), *overwrite])
    assert end.value.code == (
        f"error: {output / source.name} is a file that coco:{part}.json:my cars is read "
        "from: name another --output"
    )
    assert source.read_bytes() == before and sorted(folder.rglob("*")) == there


def test_table_is_not_replaced_either(folder):
    """What is read is the table itself, and a copy of it in the cache."""
    table = folder / "train.json"
    table.write_text("image,x1,y1,x2,y2,class\na.png,1,1,5,5,b\nb.png,1,1,5,5,b\n")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(folder / name)
    before = table.read_bytes()
    with pytest.raises(SystemExit, match="is a file that csv:train.json is read from"):
        main(["split", "csv:train.json", "--output", ".", "--overwrite"])
    assert table.read_bytes() == before and not (folder / "val.json").exists()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["1", 99, -1], [("3 boxes are", "image_id '1'")]),
        ([99], [("1 box is", "image_id 99")]),
        ([], []),
    ],
)
def test_boxes_of_unknown_images_are_said(folder, capsys, ids, said):
    path = folder / "my cars" / "all.json"
    content = json.loads(path.read_text())
    for number, image_id in enumerate(ids, start=3):
        content["annotations"].append(
            content["annotations"][0] | {"id": number, "image_id": image_id}
        )
    path.write_text(json.dumps(content))
    main(["split", "coco:my cars/all.json", "--output", "parts"])
    lines = [x for x in capsys.readouterr().out.splitlines() if "left out" in x]
    assert lines == [
        f"warning: {count} left out, of an image that the file does not have ({first})"
        for count, first in said
    ]
    parts = [json.loads((folder / "parts" / f"{p}.json").read_text()) for p in ("train", "val")]
    assert sum(len(part["annotations"]) for part in parts) == 2


def test_boxes_of_unknown_images_only_are_one_line(folder):
    path = folder / "my cars" / "all.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["image_id"] = "1"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        main(["split", "coco:my cars/all.json", "--output", "parts"])
    assert "has no annotation of an image that it has (2 annotations" in end.value.code
    assert "\n" not in end.value.code and not (folder / "parts").exists()


def test_files_that_are_there_stay(folder):
    arguments = ["split", "coco:my cars/all.json", "--output", "parts"]
    main(arguments)
    first = (folder / "parts" / "val.json").read_bytes()
    with pytest.raises(SystemExit, match="is there: name another --output, or add --overwrite"):
        main([*arguments, "--seed", "5"])
    assert (folder / "parts" / "val.json").read_bytes() == first
    main([*arguments, "--group", "day", "--overwrite"])
    days = {image["day"] for image in json.loads((folder / "parts/val.json").read_text())["images"]}
    assert len(days) == 1
