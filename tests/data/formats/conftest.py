"""Small datasets in each format."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from retina_plugin.data import register_datasets
from retina_plugin.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """``write(name, content)``: a text, bytes, or an image of a (width, height[, orientation])."""

    def to(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            exif = Image.Exif()
            exif[274] = content[2] if len(content) > 2 else 1
            Image.new("RGB", content[:2]).save(path, "JPEG", exif=exif)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return path

    return to


@pytest.fixture
def load(tmp_path, monkeypatch):
    """``load(name)``: classes, and for each image its file, size and boxes (class, XYWH, crowd)."""
    monkeypatch.chdir(tmp_path)
    before = set(DatasetCatalog)

    def read(name):
        register_datasets([name])
        images = {}
        for record in DatasetCatalog.get(name):
            file = str(Path(record["file_name"]).relative_to(tmp_path))
            boxes = [
                (a["category_id"], tuple(a["bbox"]), a["iscrowd"]) for a in record["annotations"]
            ]
            images[file] = (record["width"], record["height"], boxes)
        return list(MetadataCatalog.get(name).thing_classes), images

    yield read
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def fault(load):
    """``fault(name)``: the one line with which a dataset fails when it is loaded."""

    def line(name):
        with pytest.raises(ConfigError) as error:
            load(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    return line
