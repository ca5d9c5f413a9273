"""Datasets that do not fit together, files that are missing, functions of users that fail."""

import json
import os
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.doctor import dataset_records, quick_checks
from retina_plugin.engine import Trainer, check_config
from retina_plugin.errors import ConfigError


def test_embedded_dataset_passes(tiny_cfg, found):
    assert found(tiny_cfg) == ([], [])
    assert found(tiny_cfg, eval_only=True) == ([], [])


def reorder(content):
    """The same names with other ids: 0 to 9 become 9 to 0."""
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], reversed(names)):
        category["name"] = name


@pytest.mark.parametrize("eval_only", [False, True])
def test_other_class_order_of_the_test_set_raises(coco, found, eval_only):
    """The error names the first difference. AP would be wrong without a word."""
    (line,), _ = found(coco(reorder, "val"), eval_only=eval_only)
    assert line == (
        "test_val: class 0 is '9', but '0' in test_train (classes are numbered by category id): "
        "give both the same categories with the same ids"
    )


def test_other_class_name_of_the_test_set_raises(coco, found):
    """In a training. An evaluation cannot know what the model learned."""

    def rename(content):
        content["categories"][4]["name"] = "car"

    cfg = coco(rename, "val")
    (line,), _ = found(cfg)
    assert line.startswith("test_val: class 4 is 'car', but '4' in test_train")
    assert found(cfg, eval_only=True) == ([], [])


def test_other_spelling_of_a_class_gives_a_warning(coco, found):
    """Case, spaces and hyphens make no other class."""

    def rename(content):
        for category in content["categories"]:
            category["name"] = f"Traffic_light-{category['name']}"

    def spell(content):
        rename(content)
        content["categories"][4]["name"] = "traffic light 4"

    cfg = coco(spell, "val")
    errors, _ = found(cfg)
    assert errors  # the training set has other names altogether
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST
    path = Path(MetadataCatalog.get("test_train").json_file)
    content = json.loads(path.read_text())
    rename(content)
    path.write_text(json.dumps(content))
    cfg.DATASETS.TRAIN = ("test_train",)
    errors, (line,) = found(cfg)
    assert errors == [] and "class 4 is 'traffic light 4', but 'Traffic_light-4'" in line


def test_test_set_of_other_classes_can_be_evaluated(coco, found):
    """DATASETS.TRAIN has nothing to do with it: 7 classes there, 10 here."""

    def seven(content):
        content["categories"] = content["categories"][:7]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 7]

    cfg = coco(seven, "val")
    cfg.DATASETS.TRAIN = ("digits_scenes_train",)
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    assert found(cfg, eval_only=True) == ([], [])
    Trainer.build_test_loader(cfg, "test_val")
    (line, *_), _ = found(cfg)
    assert line.startswith("MODEL.RETINANET.NUM_CLASSES: is 7, but digits_scenes_train has 10 ")


def test_training_sets_of_other_classes_raise(coco, found):
    """Several sets in DATASETS.TRAIN: Detectron2 compares them only after they are loaded."""
    cfg = coco(reorder, "val")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_train", "test_val"), ()
    (line,), _ = found(cfg)
    assert line.startswith("test_val: class 0 is '9', but '0' in test_train")


def test_names_with_which_a_dataset_was_registered_are_compared(tiny_cfg, tiny_digits, found):
    """Detectron2 would stop with an assertion once it loads the file."""
    names = {"thing_classes": [*"123456789", "0"]}
    json_file, root = str(tiny_digits / "train.json"), str(tiny_digits / "train")
    register_coco_instances("test_named", names, json_file, root)
    try:
        tiny_cfg.DATASETS.TRAIN = ("test_named",)
        (line,), _ = found(tiny_cfg)
        assert line.startswith(f"{json_file}: class 0 is '0', but '1' in test_named")
    finally:
        DatasetCatalog.remove("test_named")
        MetadataCatalog.pop("test_named")


@pytest.mark.parametrize(
    ("plant", "text"),
    [
        (Path.unlink, "image files are missing (1 of 8, the first: "),
        (lambda path: path.write_bytes(b""), "image files of 0 bytes (1 of 8, the first: "),
        (lambda path: (path.unlink(), path.mkdir()), "folders for images (1 of 8, the first: "),
        (lambda path: (path.unlink(), path.symlink_to("no")), "image files are missing (1 of 8"),
    ],
    ids=["missing", "empty", "a folder", "a broken link"],
)
def test_image_file_that_is_not_there_raises(coco, found, tmp_path, plant, text):
    """With the first one. A training that skips bad images gets a warning."""
    cfg = coco()
    plant(tmp_path / "train" / "000003.png")
    (line,), _ = found(cfg)
    assert line.startswith("test_train: ") and text in line and "000003.png" in line
    cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    errors, (line,) = found(cfg)
    assert errors == [] and text in line
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert len(found(cfg)[0]) == 1  # a number must not come from fewer images


def test_a_set_in_both_splits_is_read_once(tiny_cfg, monkeypatch):
    """And so is every other one."""
    from retina_plugin.doctor import datasets

    read, paths = datasets.read_annotations, []
    monkeypatch.setattr(datasets, "read_annotations", lambda path: paths.append(path) or read(path))
    tiny_cfg.DATASETS.TEST = (*tiny_cfg.DATASETS.TRAIN, "digits_scenes_val")
    list(quick_checks(tiny_cfg))
    assert [os.path.basename(path) for path in paths] == ["train.json", "val.json"]


def test_unknown_dataset_has_no_records():
    with pytest.raises(ConfigError, match=r"no dataset 'digits_scene_val' .* mean 'digits_scenes_"):
        dataset_records("digits_scene_val")


@pytest.fixture
def function(tiny_cfg):
    """``function(f, **metadata)``: a config whose test and training set is what f returns."""

    def register(load, **metadata):
        DatasetCatalog.register("test_function", load)
        MetadataCatalog.get("test_function").set(**metadata)
        tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = ("test_function",)
        return tiny_cfg

    yield register
    DatasetCatalog.remove("test_function")
    MetadataCatalog.pop("test_function")


def test_failing_function_raises(function):
    """One line with the exception and the place."""

    def load():
        return {}["missing key"]

    cfg = function(load)
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    line = str(error.value)
    assert line.startswith("test_function: its function fails: KeyError: 'missing key' (test_datas")
    assert "\n" not in line


RECORDS = {
    "no image": (lambda r: r.clear(), "has no images"),
    "a text": (lambda r: r.append("a.jpg"), "entries that are no records of keys"),
    "no file_name": (lambda r: r[0].pop("file_name"), "records without a file_name (1 of 8"),
    "no height": (lambda r: r[0].pop("height"), "records whose height or width is missing"),
    "width as text": (lambda r: r[0].update(width="64"), "records whose height or width is missi"),
    "no image_id": (lambda r: r[0].pop("image_id"), "records without an image_id (1 of 8"),
    "same image_id": (lambda r: r[0].update(image_id=2), "the image_id of another one (1 of 8"),
    "no annotations": (lambda r: r[0].pop("annotations"), "records without annotations (1 of 8"),
    "missing file": (lambda r: r[0].update(file_name="no.png"), "image files are missing (1 of 8"),
}
ANNOTATIONS = {
    "no bbox": (lambda a: a.pop("bbox"), "annotations without a bbox (1 of"),
    "no bbox_mode": (lambda a: a.pop("bbox_mode"), "annotations whose bbox_mode is neither"),
    "relative mode": (lambda a: a.update(bbox_mode=3), "annotations whose bbox_mode is neither"),
    "no category_id": (lambda a: a.pop("category_id"), "annotations whose category_id is no whol"),
    "category 10 of 10": (lambda a: a.update(category_id=10), "10, annotation 0 of "),
    "category -1": (lambda a: a.update(category_id=-1), "-1, annotation 0 of "),
    "category as text": (lambda a: a.update(category_id="1"), "'1', annotation 0 of "),
    "NaN": (lambda a: a.update(bbox=[1, 2, float("nan"), 4]), "boxes with NaN (1 of"),
    "3 numbers": (lambda a: a.update(bbox=[1, 2, 3]), "boxes that are not four numbers (1 of"),
    "corners that are none": (
        lambda a: a.update(bbox=[30, 30, 10, 10], bbox_mode=0),
        "boxes with a negative width or height (1 of",
    ),
}


@pytest.mark.parametrize("fault", [*RECORDS, *ANNOTATIONS])
def test_faulty_record_of_a_function_raises(function, found, fault):
    """One line with the dataset, the record and how many there are."""
    records = DatasetCatalog.get("digits_scenes_train")
    if fault in RECORDS:
        edit, text = RECORDS[fault]
        edit(records)
    else:
        edit, text = ANNOTATIONS[fault]
        edit(records[0]["annotations"][0])
    errors, _ = found(function(lambda: records, thing_classes=[*"0123456789"]))
    assert any(line.startswith("test_function: ") and text in line for line in errors), errors


def test_training_fills_in_sizes_and_ids(function, found):
    """A training set may do without them, as in Detectron2; a test set may not."""
    records = DatasetCatalog.get("digits_scenes_train")
    for record in records:
        for key in ("height", "width", "image_id"):
            del record[key]
    cfg = function(lambda: records, thing_classes=[*"0123456789"])
    cfg.DATASETS.TEST = ()
    errors, warnings = found(cfg)
    assert errors == [] and len(warnings) == 2
    cfg.DATASETS.TEST = ("test_function",)
    assert len(found(cfg)[0]) == 2


def test_good_records_of_a_function_pass(function, found):
    """Corners, whole numbers and boxes with an angle are boxes too."""
    records = DatasetCatalog.get("digits_scenes_train")
    records[0]["annotations"] = [
        {"bbox": [1, 2, 30, 40], "bbox_mode": 0, "category_id": 1},
        {"bbox": (1.5, 2, 30, 40), "bbox_mode": 1, "category_id": 2, "iscrowd": 1},
        {"bbox": [20, 20, 10, 10, 45.0], "bbox_mode": 4, "category_id": 3},
    ]
    cfg = function(lambda: records, thing_classes=[*"0123456789"])
    cfg.DATASETS.TEST = ()
    assert found(cfg) == ([], [])
    for mapper in ("FastMapper", "DatasetMapper"):
        cfg.INPUT.MAPPER = mapper
        instances = DATASET_MAPPER_REGISTRY.build(cfg, True)(records[0])["instances"]
        assert instances.gt_classes.tolist() == [1, 3]


def test_test_set_without_class_names_raises(function, found):
    """Detectron2's conversion to COCO's format needs them. A training does not."""
    cfg = function(lambda: DatasetCatalog.get("digits_scenes_val"))
    (line,), _ = found(cfg)
    assert line.startswith("test_function: has no class names, which COCO's AP needs")
    cfg.DATASETS.TEST = ()
    assert found(cfg) == ([], [])


def test_other_name_of_the_only_class_gives_a_warning(coco, found):
    """It cannot be taken for another class."""

    def only(name):
        def edit(content):
            content["categories"] = [{"id": 1, "name": name}]
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]

        return edit

    coco(only("person"))
    cfg = coco()
    path = Path(MetadataCatalog.get("test_val").json_file)
    content = json.loads(path.read_text())
    only("pedestrian")(content)
    path.write_text(json.dumps(content))
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    errors, (line,) = found(cfg)
    assert errors == [] and "class 0 is 'pedestrian', but 'person' in test_train" in line
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_train", "test_val"), ()
    assert len(found(cfg)[0]) == 1  # Detectron2 trains on equal names only


def test_paths_may_be_objects_or_in_the_file_names(coco, found, tmp_path):
    def whole(content):
        for image in content["images"]:
            image["file_name"] = str(tmp_path / "train" / image["file_name"])

    cfg = coco(whole)
    metadata = MetadataCatalog.get("test_train")
    path = metadata.json_file
    for name in ("json_file", "image_root"):
        delattr(metadata, name)
    metadata.set(json_file=Path(path), image_root="")
    assert found(cfg) == ([], [])


def test_file_in_the_format_of_a_function_passes(function, found, tmp_path):
    """LVIS v1 has no file_name; other formats have other keys altogether."""
    path = tmp_path / "own.json"
    path.write_text('{"frames": []}')
    names = [*"0123456789"]
    cfg = function(
        lambda: DatasetCatalog.get("digits_scenes_train"), thing_classes=names, json_file=str(path)
    )
    cfg.DATASETS.TEST = ()
    assert found(cfg) == ([], [])


def test_file_name_that_is_none_is_one_line(function, found):
    cfg = function(
        lambda: [{"file_name": None, "height": 9, "width": 9, "image_id": 1, "annotations": []}]
    )
    cfg.DATASETS.TEST = ()
    (line,), _ = found(cfg)
    assert "image files are missing (1 of 1, the first: None)" in line


def test_image_folder_that_moved_is_one_error(coco, found, tmp_path):
    """Not one for each image."""
    cfg = coco()
    shutil.rmtree(tmp_path / "train")
    (line,), _ = found(cfg)
    assert line.startswith("DATASETS.TRAIN: test_train has no image_root at ")
