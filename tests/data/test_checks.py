"""Dataset checks: one line that names the key and the fix."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from retina_plugin.data.checks import check_datasets, check_num_classes
from retina_plugin.errors import ConfigError


@pytest.fixture
def dataset():
    """Registers ``dataset(name, **metadata)`` and takes it away again."""
    names = []

    def register(name, load=list, **metadata):
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def message(check, *args):
    """The one line that ``check`` raises."""
    with pytest.raises(ConfigError) as error:
        check(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_unregistered_dataset(tiny_cfg, split):
    """Names key and dataset, suggests near names, says how to register."""
    tiny_cfg.DATASETS[split] = ("coco_2017_vall",)
    text = message(check_datasets, tiny_cfg)
    assert text.startswith(f"DATASETS.{split}: ")
    assert "'coco_2017_vall'" in text
    assert "did you mean coco_2017_val" in text
    assert "register_coco_instances" in text


def test_unregistered_dataset_like_no_other(tiny_cfg):
    """No suggestion where nothing is near."""
    tiny_cfg.DATASETS.TRAIN = ("zzzzzzzz",)
    text = message(check_datasets, tiny_cfg)
    assert "'zzzzzzzz' is registered; Register" in text


def test_nothing_to_train_on(tiny_cfg):
    """DATASETS.TRAIN must not be empty; DATASETS.TEST may."""
    tiny_cfg.DATASETS.TEST = ()
    check_datasets(tiny_cfg)
    tiny_cfg.DATASETS.TRAIN = ()
    assert message(check_datasets, tiny_cfg).startswith("DATASETS.TRAIN is empty")
    check_datasets(tiny_cfg, ("TEST",))


@pytest.mark.parametrize("root", ["somewhere", "~/somewhere"])
def test_missing_coco(tiny_cfg, dataset, monkeypatch, tmp_path, root):
    """Names the variable, where COCO is looked for and how it is laid out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", root)
    json_file = "somewhere/coco/annotations/instances_train2017.json"
    dataset("coco_test_missing", json_file=json_file, image_root="somewhere/coco/train2017")
    tiny_cfg.DATASETS.TRAIN = ("coco_test_missing",)
    text = message(check_datasets, tiny_cfg)
    assert text.startswith("DATASETS.TRAIN: coco_test_missing has no json_file at " + json_file)
    assert "DETECTRON2_DATASETS" in text
    assert f"under {tmp_path / 'somewhere'} as coco/annotations/instances_" in text
    for part in ("{train,val}2017.json", "coco/{train,val}2017/", "image_info_test-dev2017.json"):
        assert part in text


@pytest.mark.parametrize("name", ["coco_2017_train", "coco_2017_val", "coco_2017_test-dev"])
def test_coco_is_where_the_message_says(name):
    """The layout in the message is Detectron2's."""
    metadata = MetadataCatalog.get(name)
    where = f"{metadata.json_file} {metadata.image_root}"
    expected = {
        "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
        "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
        "coco_2017_test-dev": ("coco/annotations/image_info_test-dev2017.json", "coco/test2017"),
    }[name]
    assert all(part in where for part in expected)


def test_missing_images(tiny_cfg, dataset, tmp_path):
    """With the annotations there, the folder of images is asked for."""
    (tmp_path / "a.json").touch()
    dataset("coco_test_images", json_file=str(tmp_path / "a.json"), image_root=str(tmp_path / "b"))
    tiny_cfg.DATASETS.TEST = ("coco_test_images",)
    text = message(check_datasets, tiny_cfg)
    assert text.startswith(f"DATASETS.TEST: coco_test_images has no image_root at {tmp_path / 'b'}")
    (tmp_path / "b").mkdir()
    check_datasets(tiny_cfg)


def test_missing_files_of_a_users_dataset(tiny_cfg, tmp_path):
    """Names what was registered; DETECTRON2_DATASETS has nothing to do with it."""
    missing = str(tmp_path / "mine.json")
    register_coco_instances("test_mine", {}, missing, str(tmp_path))
    try:
        tiny_cfg.DATASETS.TRAIN = ("test_mine",)
        text = message(check_datasets, tiny_cfg)
    finally:
        DatasetCatalog.remove("test_mine")
        MetadataCatalog.pop("test_mine")
    assert f"test_mine has no json_file at {missing}" in text
    assert "DETECTRON2_DATASETS" not in text


def test_only_what_a_run_needs_is_checked(tiny_cfg, dataset):
    """Evaluation does without the training set; files by URL are not looked for."""
    tiny_cfg.DATASETS.TRAIN = ("test_not_registered",)
    check_datasets(tiny_cfg, ("TEST",))
    dataset("test_remote", json_file="https://example.com/a.json")
    tiny_cfg.DATASETS.TEST = ("test_remote",)
    check_datasets(tiny_cfg, ("TEST",))


def test_datasets_are_prepared(tiny_cfg, dataset):
    """A dataset that can write itself is written before its files are looked for."""
    calls = []
    dataset("test_prepared", prepare=lambda: calls.append("written"))
    tiny_cfg.DATASETS.TRAIN = ("test_prepared",)
    check_datasets(tiny_cfg)
    assert calls == ["written"]


def test_datasets_that_miss_an_extra(tiny_cfg, dataset):
    """What prepare says about a missing package becomes the one line."""

    def prepare():
        raise ModuleNotFoundError("pip install it", name="it")

    dataset("test_extra", prepare=prepare)
    tiny_cfg.DATASETS.TRAIN = ("test_extra",)
    text = message(check_datasets, tiny_cfg)
    assert text == "DATASETS.TRAIN: test_extra: pip install it"


def test_num_classes(tiny_cfg):
    """Both numbers, the key with the right value, and the key that people set instead."""
    check_num_classes(tiny_cfg)
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 80
    text = message(check_num_classes, tiny_cfg)
    assert text.startswith("MODEL.RETINANET.NUM_CLASSES is 80, but digits_scenes_train has 10 ")
    assert "set MODEL.RETINANET.NUM_CLASSES 10" in text
    assert "MODEL.ROI_HEADS.NUM_CLASSES has no effect" in text


def test_num_classes_of_the_test_set(tiny_cfg, dataset):
    """DATASETS.TEST counts too; a set that does not know its classes fits any number."""
    dataset("test_unknown_classes")
    tiny_cfg.DATASETS.TEST = ("test_unknown_classes",)
    check_num_classes(tiny_cfg)
    dataset("test_three_classes", thing_classes=["a", "b", "c"])
    tiny_cfg.DATASETS.TEST = ("test_unknown_classes", "test_three_classes")
    assert "test_three_classes has 3 classes" in message(check_num_classes, tiny_cfg)
