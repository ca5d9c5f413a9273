"""Checks of a config, its datasets, its weights and the machine: one line with key and fix."""

import logging
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from retina_plugin.engine.checks import (
    check_batch_size,
    check_compiler,
    check_config,
    check_datasets,
    check_devices,
    check_num_classes,
    check_precision,
    check_run,
    check_weights,
)
from retina_plugin.errors import ConfigError


def message(check, *args, **kwargs):
    """The one line that ``check`` raises."""
    with pytest.raises(ConfigError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def warnings_of(log):
    """Messages of this package from level WARNING on, one line each."""
    found = [
        record.getMessage()
        for record in log.records
        if record.name == "retina_plugin" and record.levelno >= logging.WARNING
    ]
    assert not any("\n" in text for text in found)
    return found


@pytest.fixture
def dataset():
    """``dataset(name, **metadata)`` registers a dataset until the end of the test."""
    names = []

    def register(name, load=list, **metadata):
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


@pytest.mark.parametrize(
    ("available", "asked", "used"), [(0, None, 0), (0, 0, 0), (8, None, 8), (8, 8, 8), (8, 1, 1)]
)
def test_number_of_gpus(tiny_cfg, monkeypatch, available, asked, used):
    """All by default; without one, MODEL.DEVICE becomes the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_devices(tiny_cfg, asked) == used
    assert tiny_cfg.MODEL.DEVICE == ("cuda" if used else "cpu")


def test_cpu_can_be_chosen_on_a_gpu_machine(tiny_cfg, monkeypatch):
    """By --num-gpus 0 or by MODEL.DEVICE cpu."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_devices(tiny_cfg, 0) == 0
    assert tiny_cfg.MODEL.DEVICE == "cpu"
    assert check_devices(tiny_cfg, None) == 0


def test_gpus_with_device_cpu_raise(tiny_cfg, monkeypatch):
    """The two contradict each other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "--num-gpus 8 with MODEL.DEVICE cpu" in message(check_devices, tiny_cfg, 8)


@pytest.mark.parametrize(("available", "asked"), [(0, 8), (0, 1), (4, 5), (4, -1)])
def test_wrong_number_of_gpus_raises(tiny_cfg, monkeypatch, available, asked):
    """The message has the option, the number asked for and the number of this machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    text = message(check_devices, tiny_cfg, asked)
    assert text.startswith(f"--num-gpus {asked}: ")
    if asked > 0:
        assert f"this machine has {available}" in text
        assert ("the CPU" in text) == (available == 0)


@pytest.mark.parametrize("key", ["SOLVER.AMP.PRECISION", "TEST.PRECISION"])
def test_float16_needs_a_gpu(tiny_cfg, monkeypatch, key):
    """The message names the key and the fix. bfloat16 works on the CPU too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    tiny_cfg.SOLVER.AMP.ENABLED, tiny_cfg.SOLVER.AMP.PRECISION = True, "bfloat16"
    tiny_cfg.merge_from_list([key, "bfloat16"])
    assert check_devices(tiny_cfg, None) == 0
    tiny_cfg.merge_from_list([key, "float16"])
    line = f"{key}: float16 needs a GPU: set {key} bfloat16"
    assert message(check_devices, tiny_cfg, None) == message(check_precision, tiny_cfg) == line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    tiny_cfg.MODEL.DEVICE = "cuda:0"
    assert check_devices(tiny_cfg, None) == 1


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("SOLVER.AMP.PRECISION", "float16, bfloat16"),
        ("TEST.PRECISION", "float32, bfloat16, float16"),
    ],
)
def test_unknown_precision_raises(tiny_cfg, key, known):
    """The message lists the known ones. Without SOLVER.AMP.ENABLED, its precision is not read."""
    check_precision(tiny_cfg)
    tiny_cfg.SOLVER.AMP.PRECISION = "bfloat16"
    tiny_cfg.merge_from_list([key, "fp16"])
    if key.startswith("SOLVER"):
        check_precision(tiny_cfg)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    text = message(check_precision, tiny_cfg)
    assert text.startswith(f"{key}: unknown 'fp16'") and text.endswith(f"known: {known}")


def test_evaluation_does_not_read_amp(tiny_cfg):
    """The config of a float16 training can be evaluated on the CPU."""
    tiny_cfg.SOLVER.AMP.ENABLED = True
    assert check_devices(tiny_cfg, 0, eval_only=True) == 0
    assert "AMP.PRECISION: float16" in message(check_devices, tiny_cfg, 0)


def test_compile_without_compiler_raises(tiny_cfg, monkeypatch):
    """Only if MODEL.COMPILE asks for one."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_devices(tiny_cfg, 0)
    tiny_cfg.MODEL.COMPILE = True
    assert "MODEL.COMPILE: needs a C++ compiler" in message(check_devices, tiny_cfg, 0)


def test_compiler_of_each_device(monkeypatch):
    """The CPU needs a C++ compiler, a GPU needs Triton."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = message(check_compiler, "cpu")
    assert "C++ compiler, and there is no no-such-compiler: " in text
    monkeypatch.setenv("CXX", shutil.which("true"))
    check_compiler("cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = "MODEL.COMPILE: needs Triton: install triton, or set MODEL.COMPILE False"
    assert message(check_compiler, "cuda") == line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_compiler("cuda")


def test_existing_weights_pass(tiny_cfg, monkeypatch, tmp_path):
    """So do no weights, and a URL that can be downloaded."""
    check_weights(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04N.")  # a pickle, because downloads are verified
    check_weights(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: str(tmp_path / "a.pkl"))
    check_weights(tiny_cfg)


def test_missing_weights_file_raises(tiny_cfg, tmp_path):
    """The message has the key and the path."""
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "no.pkl")
    assert message(check_weights, tiny_cfg) == f"MODEL.WEIGHTS: no file {tmp_path / 'no.pkl'}"


def test_failed_download_of_weights_raises(tiny_cfg, monkeypatch, tmp_path):
    """The message has key, full URL, reason, cache folder and its variable, and the fix."""

    def offline(path):
        raise OSError("first line\n<urlopen error Temporary failure in name resolution>")

    monkeypatch.setattr(PathManager, "get_local_path", offline)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    tiny_cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
    text = message(check_weights, tiny_cfg)
    assert text.startswith("MODEL.WEIGHTS: cannot download https://")
    assert "fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-101.pkl" in text
    assert "Temporary failure in name resolution" in text
    assert str(tmp_path) in text and "FVCORE_CACHE" in text
    assert "set MODEL.WEIGHTS to the file" in text


def test_refused_download_raises(tiny_cfg, monkeypatch, tmp_path):
    """By Detectron2's own download, from a port that is closed."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    tiny_cfg.MODEL.WEIGHTS = "http://127.0.0.1:1/weights.pkl"
    text = message(check_weights, tiny_cfg)
    assert "cannot download http://127.0.0.1:1/weights.pkl" in text and str(tmp_path) in text


def test_good_config_gives_no_warning(tiny_cfg, log):
    """Detectron2's defaults for MODEL.ROI_HEADS give none either."""
    check_config(tiny_cfg)
    assert warnings_of(log) == []


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("NUM_CLASSES", 10, "MODEL.RETINANET.NUM_CLASSES"),
        ("SCORE_THRESH_TEST", 0.3, "MODEL.RETINANET.SCORE_THRESH_TEST"),
        ("NMS_THRESH_TEST", 0.6, "MODEL.RETINANET.NMS_THRESH_TEST"),
        ("IOU_THRESHOLDS", [0.6], "MODEL.RETINANET.IOU_THRESHOLDS"),
        ("BATCH_SIZE_PER_IMAGE", 128, "MODEL.RETINANET.SAMPLER"),
        ("PROPOSAL_APPEND_GT", False, None),
    ],
)
def test_roi_heads_keys_have_no_effect(tiny_cfg, log, key, value, instead):
    """The warning has the key, its value, and the key to set instead, if there is one."""
    tiny_cfg.MODEL.ROI_HEADS[key] = value
    check_config(tiny_cfg)
    (text,) = warnings_of(log)
    assert text.startswith(f"MODEL.ROI_HEADS.{key}: is set to {value}, but RetinaNet does not read")
    assert text.endswith(f": use {instead}" if instead else "read it")


def test_empty_batch_raises(tiny_cfg):
    """In a training. An evaluation does not read the key."""
    tiny_cfg.SOLVER.IMS_PER_BATCH = 0
    assert message(check_config, tiny_cfg).startswith("SOLVER.IMS_PER_BATCH: must be ")
    check_config(tiny_cfg, eval_only=True)


def test_datasets_and_classes_are_checked(tiny_cfg):
    """Of both splits in a training, of DATASETS.TEST in an evaluation."""
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert message(check_config, tiny_cfg).startswith("MODEL.RETINANET.NUM_CLASSES: is 3")
    assert message(check_config, tiny_cfg, eval_only=True).startswith("MODEL.RETINANET.NUM_CLASSES")
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 10
    tiny_cfg.DATASETS.TRAIN = ("test_not_registered",)
    assert message(check_config, tiny_cfg).startswith("DATASETS.TRAIN: no dataset")
    check_config(tiny_cfg, eval_only=True)


def test_p6_source_without_its_backbone_raises(tiny_cfg):
    """Detectron2's own backbone always computes P6 from res5."""
    tiny_cfg.MODEL.RETINANET.P6_SOURCE = "p5"
    check_config(tiny_cfg)
    tiny_cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    text = message(check_config, tiny_cfg)
    assert "MODEL.RETINANET.P6_SOURCE" in text
    assert "set MODEL.BACKBONE.NAME build_retina_fpn_backbone" in text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["SOLVER.ACCUMULATE", 0], "SOLVER.ACCUMULATE: must be a whole number from 1 on, got 0"),
        (
            ["MODEL.RETINANET.LOSS_IN_PLACE", True, "MODEL.RETINANET.SAMPLER", "OHEM"],
            "MODEL.RETINANET.LOSS_IN_PLACE: has no effect with MODEL.RETINANET.SAMPLER OHEM, whose "
            "loss is that of a few anchors: set LOSS_IN_PLACE False",
        ),
        (
            ["MODEL.RETINANET.LOSS_IN_PLACE", True, "SOLVER.AMP.ENABLED", True],
            "MODEL.RETINANET.LOSS_IN_PLACE: writes gradients before they are scaled, and float16 "
            "cannot hold those: set SOLVER.AMP.PRECISION bfloat16, or LOSS_IN_PLACE False",
        ),
    ],
)
def test_impossible_training_options_raise(tiny_cfg, overrides, line):
    """In a training. An evaluation does not read them."""
    tiny_cfg.merge_from_list(overrides)
    assert message(check_config, tiny_cfg) == line
    check_config(tiny_cfg, eval_only=True)


def test_unavailable_loss_backend_raises(tiny_cfg, monkeypatch):
    """In a training. An evaluation computes no loss."""

    def unavailable(backend):
        raise ConfigError(f"MODEL.RETINANET.LOSS_BACKEND {backend} is not available")

    monkeypatch.setattr("retina_plugin.doctor.config.check_backend", unavailable)
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "triton"
    line = "MODEL.RETINANET.LOSS_BACKEND: triton is not available"
    assert message(check_config, tiny_cfg) == line
    check_config(tiny_cfg, eval_only=True)


def test_loss_in_place_alone_passes(tiny_cfg):
    """With the default sampler and precision."""
    tiny_cfg.MODEL.RETINANET.LOSS_IN_PLACE = True
    check_config(tiny_cfg)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_unregistered_dataset_raises(tiny_cfg, split):
    """The message has key, dataset and similar names, and says how to name or register one."""
    tiny_cfg.DATASETS[split] = ("coco_2017_vall",)
    text = message(check_datasets, tiny_cfg)
    assert text.startswith(f"DATASETS.{split}: ")
    assert "'coco_2017_vall'" in text
    assert "did you mean 'coco_2017_val'" in text
    assert "coco:FILE.json" in text and "register it from a module of IMPORTS" in text


def test_unregistered_dataset_with_no_similar_name_raises(tiny_cfg):
    """Nothing is suggested."""
    tiny_cfg.DATASETS.TRAIN = ("zzzzzzzz",)
    text = message(check_datasets, tiny_cfg)
    assert "'zzzzzzzz' is registered: name yours" in text


def test_empty_training_set_raises(tiny_cfg):
    """DATASETS.TEST may be empty, unless an evaluation is all that is asked for."""
    tiny_cfg.DATASETS.TEST = ()
    check_datasets(tiny_cfg)
    tiny_cfg.DATASETS.TRAIN = ()
    assert message(check_datasets, tiny_cfg).startswith("DATASETS.TRAIN: is empty")
    assert message(check_datasets, tiny_cfg, ("TEST",)).startswith("DATASETS.TEST: is empty")


@pytest.mark.parametrize("root", ["somewhere", "~/somewhere"])
def test_missing_coco_raises(tiny_cfg, dataset, monkeypatch, tmp_path, root):
    """The message has the variable, the folder and its layout."""
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
def test_layout_in_the_message_is_detectron2s(name):
    """Detectron2 looks for COCO's files there."""
    metadata = MetadataCatalog.get(name)
    where = f"{metadata.json_file} {metadata.image_root}"
    expected = {
        "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
        "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
        "coco_2017_test-dev": ("coco/annotations/image_info_test-dev2017.json", "coco/test2017"),
    }[name]
    assert all(part in where for part in expected)


def test_missing_image_folder_raises(tiny_cfg, tiny_digits, dataset, tmp_path):
    """Although the annotations are there."""
    (tmp_path / "a.json").write_text((tiny_digits / "val.json").read_text())
    load = DatasetCatalog["digits_scenes_val"]
    dataset(
        "coco_test_images", load, json_file=str(tmp_path / "a.json"), image_root=str(tmp_path / "b")
    )
    tiny_cfg.DATASETS.TEST = ("coco_test_images",)
    text = message(check_datasets, tiny_cfg)
    assert text.startswith(f"DATASETS.TEST: coco_test_images has no image_root at {tmp_path / 'b'}")
    (tmp_path / "b").symlink_to(tiny_digits / "val")
    check_datasets(tiny_cfg)


def test_missing_file_of_a_users_dataset_raises(tiny_cfg, tmp_path):
    """The message does not speak of DETECTRON2_DATASETS, which is for COCO."""
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


def test_unused_datasets_and_urls_are_not_checked(tiny_cfg, dataset):
    """An evaluation does not need the training set."""
    tiny_cfg.DATASETS.TRAIN = ("test_not_registered",)
    check_datasets(tiny_cfg, ("TEST",))
    load = DatasetCatalog["digits_scenes_val"]
    dataset("test_remote", load, json_file="https://example.com/a.json")
    tiny_cfg.DATASETS.TEST = ("test_remote",)
    check_datasets(tiny_cfg, ("TEST",))


def test_dataset_is_prepared_before_it_is_checked(tiny_cfg, dataset):
    """The embedded dataset writes its files so."""
    calls = []
    load = DatasetCatalog["digits_scenes_val"]
    dataset("test_prepared", load, prepare=lambda: calls.append("written"))
    tiny_cfg.DATASETS.TRAIN = ("test_prepared",)
    check_datasets(tiny_cfg)
    assert calls == ["written"]


def test_missing_package_of_a_dataset_raises(tiny_cfg, dataset):
    """The message is that of the failed import."""

    def prepare():
        raise ModuleNotFoundError("pip install it", name="it")

    dataset("test_extra", prepare=prepare)
    tiny_cfg.DATASETS.TRAIN = ("test_extra",)
    text = message(check_datasets, tiny_cfg)
    assert text == "DATASETS.TRAIN: test_extra: pip install it"


def test_wrong_number_of_classes_raises(tiny_cfg):
    """The message has both numbers, and the key with the right value."""
    check_num_classes(tiny_cfg)
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 80
    text = message(check_num_classes, tiny_cfg)
    assert text.startswith("MODEL.RETINANET.NUM_CLASSES: is 80, but digits_scenes_train has 10 ")
    assert "set MODEL.RETINANET.NUM_CLASSES 10" in text
    assert "MODEL.ROI_HEADS.NUM_CLASSES has no effect" in text


def test_wrong_number_of_classes_in_the_test_set_raises(tiny_cfg, dataset):
    """A dataset whose classes are not known passes."""
    dataset("test_unknown_classes")
    tiny_cfg.DATASETS.TEST = ("test_unknown_classes",)
    check_num_classes(tiny_cfg)
    dataset("test_three_classes", thing_classes=["a", "b", "c"])
    tiny_cfg.DATASETS.TEST = ("test_unknown_classes", "test_three_classes")
    assert "test_three_classes has 3 classes" in message(check_num_classes, tiny_cfg)


def test_run_checks_everything(tiny_cfg, monkeypatch):
    """Datasets, devices and weights, with one call."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_run(tiny_cfg, None) == 0 and tiny_cfg.MODEL.DEVICE == "cpu"
    assert "--num-gpus 1" in message(check_run, tiny_cfg, 1)
    tiny_cfg.MODEL.WEIGHTS = "no-such-file.pth"
    assert "MODEL.WEIGHTS" in message(check_run, tiny_cfg, 0)
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert "NUM_CLASSES" in message(check_run, tiny_cfg, 0)


def test_resumed_run_needs_no_weights(tiny_cfg, tmp_path):
    """It loads the last checkpoint instead, if there is one."""
    tiny_cfg.OUTPUT_DIR, tiny_cfg.MODEL.WEIGHTS = str(tmp_path), "no-such-file.pth"
    assert "MODEL.WEIGHTS" in message(check_run, tiny_cfg, 0, resume=True)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert check_run(tiny_cfg, 0, resume=True) == 0
    assert "MODEL.WEIGHTS" in message(check_run, tiny_cfg, 0)


def test_evaluation_without_weights_raises(tiny_cfg):
    """Untrained weights are hardly meant."""
    assert check_run(tiny_cfg, 0) == 0
    assert message(check_run, tiny_cfg, 0, eval_only=True).startswith("--eval-only: set MODEL.WEI")


@pytest.mark.parametrize(
    ("batch", "processes", "nearest", "base_lr"),
    [(16, 3, 15, "0.009375"), (1, 4, 4, "0.04"), (14, 8, 16, "0.0114286")],
)
def test_uneven_batch_raises(tiny_cfg, batch, processes, nearest, base_lr):
    """The message has the nearest batch that can be split, and its learning rate."""
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.BASE_LR = batch, 0.01
    assert message(check_batch_size, tiny_cfg, processes) == (
        f"SOLVER.IMS_PER_BATCH: {batch} cannot be split over {processes} processes: set it to "
        f"{nearest} and SOLVER.BASE_LR to {base_lr}"
    )
    check_batch_size(tiny_cfg, batch)
    check_batch_size(tiny_cfg, 1)


def test_batch_is_split_over_processes_and_passes(tiny_cfg):
    """The message names both."""
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.ACCUMULATE = 16, 4
    check_batch_size(tiny_cfg, 4)
    assert message(check_batch_size, tiny_cfg, 8).startswith(
        "SOLVER.IMS_PER_BATCH: 16 cannot be split over 8 processes of SOLVER.ACCUMULATE 4 passes: "
        "set it to 32 and"
    )
