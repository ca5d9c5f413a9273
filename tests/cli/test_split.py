"""``retina split``: the files, the counts, what to paste."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

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
