"""What is found wrong with a config before anything is built: one-line errors, warnings."""

import logging

import pytest
import torch
from detectron2.utils.file_io import PathManager

from retina_plugin.engine import check_config, check_devices, check_weights
from retina_plugin.errors import ConfigError


def message(check, *args, **kwargs):
    """The one line that ``check`` raises."""
    with pytest.raises(ConfigError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def warnings_of(log):
    """Messages of our logger from level warning on, one line each."""
    found = [
        record.getMessage()
        for record in log.records
        if record.name == "retina_plugin" and record.levelno >= logging.WARNING
    ]
    assert not any("\n" in text for text in found)
    return found


@pytest.mark.parametrize(
    ("available", "asked", "used"), [(0, None, 0), (0, 0, 0), (8, None, 8), (8, 8, 8), (8, 1, 1)]
)
def test_number_of_gpus(tiny_cfg, monkeypatch, log, available, asked, used):
    """All by default; with none the CPU, and a line that says so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_devices(tiny_cfg, asked) == used
    assert tiny_cfg.MODEL.DEVICE == ("cuda" if used else "cpu")
    lines = [record.getMessage() for record in log.records]
    assert lines == ([] if used else ["No GPU is used: running on cpu"])


def test_the_cpu_although_there_are_gpus(tiny_cfg, monkeypatch):
    """--num-gpus 0 and MODEL.DEVICE cpu both mean no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_devices(tiny_cfg, 0) == 0
    assert tiny_cfg.MODEL.DEVICE == "cpu"
    assert check_devices(tiny_cfg, None) == 0


@pytest.mark.parametrize(("available", "asked"), [(0, 8), (0, 1), (4, 5), (4, -1)])
def test_more_gpus_than_there_are(tiny_cfg, monkeypatch, available, asked):
    """Names the option, what was asked for and what there is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    text = message(check_devices, tiny_cfg, asked)
    assert text.startswith(f"--num-gpus {asked}: ")
    if asked > 0:
        assert f"this machine has {available}" in text
        assert ("(the CPU)" in text) == (available == 0)


@pytest.mark.parametrize("key", ["SOLVER.AMP.PRECISION", "TEST.PRECISION"])
def test_float16_needs_a_gpu(tiny_cfg, monkeypatch, key):
    """Names the key and the fix; bfloat16 is for the CPU too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("bfloat16", "float16"):
        tiny_cfg.SOLVER.AMP.ENABLED = True
        tiny_cfg.merge_from_list(["SOLVER.AMP.PRECISION", "bfloat16", key, name])
        if name == "bfloat16":
            assert check_devices(tiny_cfg, None) == 0
    assert (
        message(check_devices, tiny_cfg, None) == f"{key} float16 needs a GPU: set {key} bfloat16"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert check_devices(tiny_cfg, None) == 1


def test_evaluation_does_not_read_amp(tiny_cfg):
    """A float16 training's config evaluates on the CPU."""
    tiny_cfg.SOLVER.AMP.ENABLED = True
    assert check_devices(tiny_cfg, 0, eval_only=True) == 0
    assert "AMP.PRECISION float16" in message(check_devices, tiny_cfg, 0)


def test_compiling_needs_a_compiler(tiny_cfg, monkeypatch):
    """Said before the model is built; only where it is asked for."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_devices(tiny_cfg, 0)
    tiny_cfg.MODEL.COMPILE = True
    assert "MODEL.COMPILE needs a C++ compiler" in message(check_devices, tiny_cfg, 0)


def test_weights_that_are_there(tiny_cfg, monkeypatch, tmp_path):
    """No weights, a file, and a URL that can be fetched pass."""
    check_weights(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").touch()
    check_weights(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: str(tmp_path / "a.pkl"))
    check_weights(tiny_cfg)


def test_weights_file_that_is_not_there(tiny_cfg, tmp_path):
    """Names the key and the path."""
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "no.pkl")
    assert message(check_weights, tiny_cfg) == f"MODEL.WEIGHTS: no file {tmp_path / 'no.pkl'}"


def test_weights_that_cannot_be_downloaded(tiny_cfg, monkeypatch, tmp_path):
    """Names key, full URL, reason, cache folder and its variable, and the fix."""

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


def test_download_that_is_refused(tiny_cfg, monkeypatch, tmp_path):
    """The same by Detectron2's own download, from a port where nobody listens."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    tiny_cfg.MODEL.WEIGHTS = "http://127.0.0.1:1/weights.pkl"
    text = message(check_weights, tiny_cfg)
    assert "cannot download http://127.0.0.1:1/weights.pkl" in text and str(tmp_path) in text


def test_a_checked_config_gives_no_warning(tiny_cfg, log):
    """Neither does Detectron2's default for MODEL.ROI_HEADS."""
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
    """A warning names the key, its value and the one that works, if there is one."""
    tiny_cfg.MODEL.ROI_HEADS[key] = value
    check_config(tiny_cfg)
    (text,) = warnings_of(log)
    assert text.startswith(f"MODEL.ROI_HEADS.{key} is set to {value}, but RetinaNet does not read")
    assert text.endswith(f": use {instead}" if instead else "read it")


@pytest.mark.parametrize(
    ("base_lr", "batch", "scaled"),
    [(0.01, 8, "0.005"), (0.01, 2, "0.00125"), (0.005, 16, "0.01"), (0.02, 16, "0.01")],
)
def test_learning_rate_for_another_batch(tiny_cfg, log, base_lr, batch, scaled):
    """A warning with both keys and the linear-scaling value: .01 is for 16 images."""
    tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.IMS_PER_BATCH = base_lr, batch
    check_config(tiny_cfg)
    (text,) = warnings_of(log)
    assert f"SOLVER.BASE_LR {base_lr} is for another batch size" in text
    assert f"SOLVER.IMS_PER_BATCH {batch}:" in text
    assert f"linear scaling gives SOLVER.BASE_LR {scaled} " in text


@pytest.mark.parametrize(("base_lr", "batch"), [(0.01, 16), (0.02, 32), (0.00125, 2), (0.012, 16)])
def test_learning_rate_that_fits(tiny_cfg, log, base_lr, batch):
    """The linear-scaling value, and a choice near it, pass."""
    tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.IMS_PER_BATCH = base_lr, batch
    check_config(tiny_cfg)
    assert warnings_of(log) == []


def test_learning_rate_warning_can_be_turned_off(tiny_cfg, log):
    """By SOLVER.LR_PER_IMAGE 0; evaluation has no learning rate."""
    tiny_cfg.SOLVER.BASE_LR = 1.0
    check_config(tiny_cfg, eval_only=True)
    tiny_cfg.SOLVER.LR_PER_IMAGE = 0.0
    check_config(tiny_cfg)
    assert warnings_of(log) == []


def test_learning_rate_follows_lr_per_image(tiny_cfg, log):
    """Another recipe's own rate per image is what a run is compared with."""
    tiny_cfg.SOLVER.LR_PER_IMAGE = 0.1
    tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.IMS_PER_BATCH = 0.4, 4
    check_config(tiny_cfg)
    assert warnings_of(log) == []


def test_batch_of_nothing(tiny_cfg):
    """Names the key; evaluation does not mind."""
    tiny_cfg.SOLVER.IMS_PER_BATCH = 0
    assert message(check_config, tiny_cfg).startswith("SOLVER.IMS_PER_BATCH must be at least 1")
    check_config(tiny_cfg, eval_only=True)


def test_datasets_and_classes_are_checked(tiny_cfg):
    """Both, before anything is built; evaluation looks at DATASETS.TEST only."""
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert message(check_config, tiny_cfg).startswith("MODEL.RETINANET.NUM_CLASSES is 3")
    assert message(check_config, tiny_cfg, eval_only=True).startswith("MODEL.RETINANET.NUM_CLASSES")
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 10
    tiny_cfg.DATASETS.TRAIN = ("test_not_registered",)
    assert message(check_config, tiny_cfg).startswith("DATASETS.TRAIN: no dataset")
    check_config(tiny_cfg, eval_only=True)


def test_p6_source_that_is_not_read(tiny_cfg):
    """Detectron2's own backbone takes P6 from res5: p5 needs ours."""
    tiny_cfg.MODEL.RETINANET.P6_SOURCE = "p5"
    check_config(tiny_cfg)
    tiny_cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    text = message(check_config, tiny_cfg)
    assert "MODEL.RETINANET.P6_SOURCE" in text
    assert "set MODEL.BACKBONE.NAME build_retina_fpn_backbone" in text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["SOLVER.ACCUMULATE", 0], "SOLVER.ACCUMULATE must be at least 1, got 0"),
        (
            ["SOLVER.DDP.COMPRESSION", "int8"],
            "SOLVER.DDP.COMPRESSION: no 'int8'; known: none, float16, bfloat16",
        ),
        (
            ["SOLVER.DDP.STATIC_GRAPH", True, "SOLVER.ACCUMULATE", 2],
            "SOLVER.DDP.STATIC_GRAPH with SOLVER.ACCUMULATE > 1 is not supported by PyTorch: set "
            "SOLVER.DDP.STATIC_GRAPH False",
        ),
        (
            ["MODEL.RETINANET.LOSS_IN_PLACE", True, "MODEL.RETINANET.SAMPLER", "OHEM"],
            "MODEL.RETINANET.LOSS_IN_PLACE has no effect with MODEL.RETINANET.SAMPLER OHEM, whose "
            "loss is that of a few anchors: set LOSS_IN_PLACE False",
        ),
        (
            ["MODEL.RETINANET.LOSS_IN_PLACE", True, "SOLVER.AMP.ENABLED", True],
            "MODEL.RETINANET.LOSS_IN_PLACE writes gradients that are not scaled yet, which "
            "SOLVER.AMP.PRECISION float16 cannot hold: set it to bfloat16, or LOSS_IN_PLACE False",
        ),
    ],
)
def test_options_of_training_that_cannot_be(tiny_cfg, overrides, line):
    """One line with the keys; evaluation does not mind."""
    tiny_cfg.merge_from_list(overrides)
    assert message(check_config, tiny_cfg) == line
    check_config(tiny_cfg, eval_only=True)


def test_a_loss_backend_that_cannot_be_had(tiny_cfg, monkeypatch):
    """Said before a model is built, by a training; evaluation has no loss."""
    monkeypatch.setattr(
        "retina_plugin.losses.backends.select.unavailable_reason", lambda name: "no C++ compiler"
    )
    check_config(tiny_cfg)
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "native"
    line = "MODEL.RETINANET.LOSS_BACKEND native is not available: no C++ compiler; set it to auto"
    assert message(check_config, tiny_cfg) == line
    check_config(tiny_cfg, eval_only=True)


def test_a_negative_pad_divisor(tiny_cfg):
    """Evaluation pads too."""
    tiny_cfg.INPUT.PAD_DIVISOR = -32
    line = "INPUT.PAD_DIVISOR must be at least 0, got -32"
    assert message(check_config, tiny_cfg) == message(check_config, tiny_cfg, True) == line


def test_loss_in_place_by_itself(tiny_cfg):
    """Is an option like any other."""
    tiny_cfg.MODEL.RETINANET.LOSS_IN_PLACE = True
    check_config(tiny_cfg)
