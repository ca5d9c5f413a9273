"""Names in the catalogs: converted once, renewed when a file changes, harmless when broken."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from retina_plugin.cli import main
from retina_plugin.data import FastMapper, register_datasets
from retina_plugin.data.formats import folder_name, parse, unknown_dataset
from retina_plugin.doctor import known_classes
from retina_plugin.engine import Trainer, check_config, register_user_parts, setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import COCOEvaluator, FastCOCOEvaluator

CSV = "csv:c/train.csv:c/images"


@pytest.fixture
def table(write):
    write("c/images/a.jpg", (100, 80))
    return write("c/train.csv", "a.jpg,1,2,30,40,car\n")


def json_file(name):
    return Path(MetadataCatalog.get(name).json_file)


def test_coco_file_stays_where_it_is(write, load):
    """Without a folder of images, names are relative to the file's."""
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "car"}]
    images = [{"id": 1, "file_name": "images/a.jpg", "width": 9, "height": 9}]
    content = {"categories": categories, "images": images, "annotations": []}
    path = write("c/train.json", json.dumps(content))
    expected = ["car", "dog"], {"c/images/a.jpg": (9, 9, [])}
    assert load("coco:c/train.json") == load(f"coco:{path}:c") == expected
    assert json_file("coco:c/train.json") == path
    register_datasets(["coco:./c/train.json"])  # before it is loaded
    assert MetadataCatalog.get("coco:./c/train.json").thing_classes == ["car", "dog"]


def test_written_once_until_a_file_changes(table, load):
    load(CSV)
    first, stamp = json_file(CSV), json_file(CSV).stat().st_mtime_ns
    load(CSV)
    assert json_file(CSV) == first and first.stat().st_mtime_ns == stamp
    table.write_text("a.jpg,1,2,30,40,car\na.jpg,5,5,9,9,dog\n")
    assert load(CSV)[0] == ["car", "dog"]
    assert json_file(CSV) != first and first.is_file()  # a running training goes on with the old


def test_damaged_copy_is_written_again(table, load):
    expected = load(CSV)
    json_file(CSV).write_text("{")
    assert load(CSV) == expected


def test_broken_data_raise_only_when_they_are_loaded(table, load, fault, tmp_path):
    shutil.move(table, tmp_path / "away.csv")
    register_datasets([CSV])
    assert known_classes(CSV) == []
    assert "train.csv: cannot be read: No such file" in fault(CSV)
    shutil.move(tmp_path / "away.csv", table)
    assert load(CSV)[0] == ["car"]


def test_other_names_are_left_alone(load):
    register_datasets(["digits_scenes_train", "no_such_set", 3])
    assert "no_such_set" not in DatasetCatalog
    DatasetCatalog.register("voc:mine", lambda: [])
    register_datasets(["voc:mine"])
    assert DatasetCatalog.get("voc:mine") == []


def test_name_without_a_path_raises():
    with pytest.raises(ConfigError, match="voc:: no path follows: write voc:FOLDER"):
        register_datasets(["voc:"])


def _register(folder, cache, results):
    os.chdir(folder)
    os.environ["RETINA_PLUGIN_CACHE"] = cache
    register_datasets([CSV])
    results.put(len(DatasetCatalog.get(CSV)))


def test_several_processes_at_once(table, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (str(tmp_path), str(tmp_path / "cache"), results)
    processes = [context.Process(target=_register, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [1, 1, 1]
    for process in processes:
        process.join()
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_paths_with_colons(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a:b/x.json", "{}")
    at = str(tmp_path)
    assert parse("coco:a:b/x.json:im") == ("coco", f"{at}/a:b/x.json", f"{at}/im")
    assert parse("coco:~/x.json:~/im/") == ("coco", f"{at}/x.json", f"{at}/im")
    assert parse("voc:C:\\cars:val") == ("voc", f"{at}/C:\\cars", "val")
    assert parse("yolo:d.yaml") == ("yolo", f"{at}/d.yaml", "")
    assert parse("cars") is parse("cars:voc") is None


def test_folder_names():
    """A plain name stays; others are safe, short and different."""
    assert folder_name("coco_2017_val") == "coco_2017_val"
    names = ["coco:a/b.json:../im/", "coco:a_b.json:im", "coco:a-b.json:im", f"voc:{'ö' * 500}"]
    made = [folder_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all("/" not in name and ":" not in name and len(name.encode()) < 255 for name in made)


@pytest.mark.parametrize(
    ("name", "near"),
    [("cocoo:a.json", "coco:a.json"), ("VOC:x", "voc:x"), ("a/b.json", "coco:a/b.json"),
     ("data.yaml", "yolo:data.yaml"), ("digits_scenes_trian", "digits_scenes_train")],
)  # fmt: skip
def test_misspelt_names_get_a_hint(name, near):
    assert f"did you mean '{near}'" in unknown_dataset(name)


@pytest.fixture
def difficult(write, load):
    """A VOC folder: a car, and a difficult one on the other side."""
    box = "<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>40</ymax></bndbox>"
    objects = [("", 1, 40), ("<difficult>1</difficult>", 61, 100)]
    inner = "".join(
        f"<object><name>car</name>{more}{box.format(a, b)}</object>" for more, a, b in objects
    )
    write("v/Annotations/a.xml", f"<annotation>{inner}</annotation>")
    write("v/a.jpg", (100, 80))
    write("v/Annotations/a.jpg", (100, 80))
    load("voc:v")
    return "voc:v"


def test_difficult_objects_do_not_train(difficult):
    (record,) = DatasetCatalog.get(difficult)
    arguments = {"augmentations": [], "image_format": "BGR"}
    instances = FastMapper(True, **arguments)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 40, 40]]
    instances = FastMapper(True, keep_crowd=True, **arguments)(record)["instances"]
    assert instances.gt_iscrowd.tolist() == [False, True]  # for IGNORE_IOF_THRESH


@pytest.mark.parametrize("evaluator", [COCOEvaluator, FastCOCOEvaluator])
@pytest.mark.parametrize("found_difficult", [False, True])
def test_difficult_objects_do_not_count_in_ap(difficult, found_difficult, evaluator):
    """Neither found nor missed."""
    boxes = [[60.0, 0, 100, 40], [0.0, 0, 40, 40]] if found_difficult else [[0.0, 0, 40, 40]]
    instances = Instances((80, 100), pred_boxes=Boxes(torch.tensor(boxes)))
    instances.scores = torch.tensor([0.9, 0.8][-len(boxes) :])
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    judge = evaluator(difficult, *([("bbox",)] if evaluator is COCOEvaluator else []))
    judge.reset()
    judge.process([{"image_id": 1}], [{"instances": instances}])
    assert judge.evaluate()["bbox"]["AP"] == pytest.approx(100.0)


@pytest.mark.slow
def test_trained_and_evaluated_from_yaml(tiny_cfg, tiny_digits, tmp_path, monkeypatch):
    """In a config file, with two test sets; the folders of their results are safe."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_digits, tmp_path / "d")
    train, val = (f"coco:d/{part}.json:d/{part}/" for part in ("train", "val"))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (train,), (val, "digits_scenes_val")
    tiny_cfg.TEST.EVAL_PERIOD, tiny_cfg.DATALOADER.NUM_WORKERS = 2, 0
    tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    Path("a.yaml").write_text(tiny_cfg.dump())
    before = set(DatasetCatalog)
    try:
        main(["train", "--config-file", "a.yaml", "--num-gpus", "0"])
        folders = {path.name for path in Path(tiny_cfg.OUTPUT_DIR, "inference").iterdir()}
        assert folders == {folder_name(val), "digits_scenes_val"}
        cfg = setup_cfg("a.yaml")
        assert len(Trainer.build_test_loader(cfg, val)) == 4
    finally:
        for name in set(DatasetCatalog) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


def test_checked_and_evaluated_in_a_safe_folder(tiny_cfg, load, write, table):
    """The doctor's checks of a config pass, and name what is wrong with the data."""
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = (CSV,)
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 1
    Path("a.yaml").write_text(tiny_cfg.dump())
    cfg = setup_cfg("a.yaml")
    check_config(cfg)
    evaluator = Trainer.build_evaluator(cfg, CSV)
    assert evaluator._output_dir == str(Path(cfg.OUTPUT_DIR, "inference", folder_name(CSV)))
    table.write_text("a.jpg,1,2,30,x,car\n")
    with pytest.raises(ConfigError, match="train.csv: has no column for"):
        check_config(cfg)
    cfg.DATASETS.TRAIN = ("cvs:c/train.csv",)
    with pytest.raises(ConfigError, match=r"did you mean 'csv:c/train.csv'\?.*coco:FILE.json"):
        check_config(cfg)


def _spawned(folder, cfg, results):
    os.chdir(folder)
    register_user_parts(cfg)
    results.put((len(DatasetCatalog.get(CSV)), MetadataCatalog.get(CSV).json_file))


@pytest.mark.slow
def test_spawned_process_registers_them_too(tiny_cfg, load, table, tmp_path):
    """It gets the config only, as the processes of several GPUs do."""
    load(CSV)
    tiny_cfg.DATASETS.TRAIN = (CSV,)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_spawned, args=(str(tmp_path), tiny_cfg, results))
    process.start()
    assert results.get(timeout=120) == (1, str(json_file(CSV)))
    process.join()
