"""From the command line to a checked config: defaults, overrides, one-line errors, warnings."""

import logging
import pickle
import random
import sys

import pytest
import torch
from detectron2.utils.file_io import PathManager

from retina_plugin.engine import (
    argument_parser,
    check_config,
    check_devices,
    check_weights,
    import_user_modules,
    setup_cfg,
)
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


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_command_line_is_detectron2s():
    """Every option of Detectron2's users, and overrides at the end."""
    args = argument_parser().parse_args(
        "--config-file a.yaml --num-gpus 8 --resume --eval-only --num-machines 2 --machine-rank 1"
        " --dist-url tcp://10.0.0.1:9 SOLVER.BASE_LR 0.1 MODEL.WEIGHTS b.pkl".split()
    )
    assert (args.config_file, args.num_gpus, args.num_machines, args.machine_rank) == (
        *("a.yaml", 8, 2),
        1,
    )
    assert args.resume and args.eval_only
    assert args.dist_url == "tcp://10.0.0.1:9"
    assert args.opts == ["SOLVER.BASE_LR", "0.1", "MODEL.WEIGHTS", "b.pkl"]


def test_command_line_defaults(capsys):
    """No number of GPUs is all that are there; the config file must be named."""
    args = argument_parser().parse_args(["--config-file", "a.yaml"])
    assert args.num_gpus is None
    assert not args.resume and not args.eval_only
    assert args.num_machines == 1 and args.opts == []
    with pytest.raises(SystemExit):
        argument_parser().parse_args([])
    assert "--config-file" in capsys.readouterr().err


def test_overrides_win_over_the_file_and_its_base(yaml_file):
    """base < file < overrides."""
    yaml_file("SOLVER: {BASE_LR: 0.1, MAX_ITER: 10, STEPS: [5]}\nVERSION: 2", "base.yaml")
    path = yaml_file("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 20, STEPS: [15]}")
    cfg = setup_cfg(path, ["SOLVER.STEPS", "(19,)"])
    assert cfg.SOLVER.BASE_LR == 0.1
    assert cfg.SOLVER.MAX_ITER == 20
    assert cfg.SOLVER.STEPS == (19,)
    assert not cfg.is_frozen()


def test_output_dir_follows_the_file(yaml_file):
    """output/NAME unless the file or an override names another folder."""
    path = yaml_file("VERSION: 2", "my_model.yaml")
    assert setup_cfg(path).OUTPUT_DIR == "output/my_model"
    assert setup_cfg(path, ["OUTPUT_DIR", "here"]).OUTPUT_DIR == "here"
    assert setup_cfg(yaml_file("OUTPUT_DIR: there")).OUTPUT_DIR == "there"


@pytest.mark.parametrize(
    ("text", "opts", "expected"),
    [
        ("MODEL: {RETINANET: {NUM_CLASES: 3}}", [], "MODEL.RETINANET.NUM_CLASSES"),
        ("", ["MODEL.RETINANET.NUM_CLASES", "3"], "MODEL.RETINANET.NUM_CLASSES"),
        ("", ["SOLVER.BASE_LR"], "odd length"),
        ("", ["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        ("SOLVER: {MAX_ITER: many}", [], "SOLVER.MAX_ITER"),
        ("SOLVER: [", [], "line 1"),
        ("_BASE_: nowhere.yaml", [], "nowhere.yaml"),
    ],
    ids=["key in file", "key", "odd", "type", "type in file", "no YAML", "no base"],
)
def test_configs_that_cannot_be_read(yaml_file, text, opts, expected):
    """One line with the file and what is wrong; near keys for a key that does not exist."""
    path = yaml_file(text or "VERSION: 2")
    found = message(setup_cfg, path, opts)
    assert path in found and expected in found
    if "NUM_CLASES" in text + "".join(opts):
        assert "did you mean MODEL.RETINANET.NUM_CLASSES" in found


def test_config_file_that_does_not_exist(tmp_path):
    """Names the option and the path."""
    path = str(tmp_path / "no.yaml")
    assert message(setup_cfg, path) == f"--config-file: no file {path}"


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


def test_mixed_precision_needs_a_gpu(tiny_cfg, monkeypatch):
    """Names the key and the fix."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    assert "set SOLVER.AMP.ENABLED False" in message(check_devices, tiny_cfg, None)


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


@pytest.fixture
def forget_modules():
    """Modules that a test imports are forgotten after it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_imports_of_the_users_files_and_modules(yaml_file, tmp_path, monkeypatch, forget_modules):
    """Both kinds are imported by setup_cfg, once, and can be found by pickle."""
    (tmp_path / "test_user_file.py").write_text("class Loss: pass\nruns = []\nruns.append(1)")
    (tmp_path / "test_user_module.py").write_text("value = 3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = setup_cfg(yaml_file("IMPORTS: [test_user_file.py, test_user_module]\nVERSION: 2"))
    import_user_modules(cfg)
    user_file = sys.modules["test_user_file"]
    assert user_file.runs == [1]
    assert pickle.loads(pickle.dumps(user_file.Loss)) is user_file.Loss
    assert sys.modules["test_user_module"].value == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_file.py", "IMPORTS: no file "),
        ("no_such.module", "IMPORTS: no module 'no_such.module' is installed or on PYTHONPATH"),
        ("random.py", "IMPORTS: random.py would hide the module 'random'"),
    ],
)
def test_imports_that_cannot_be_made(tiny_cfg, tmp_path, monkeypatch, name, expected):
    """One line that names the key; a file named like a module in use does not replace it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").touch()
    tiny_cfg.IMPORTS = (name,)
    assert message(import_user_modules, tiny_cfg).startswith(expected)
    assert sys.modules["random"] is random


def test_errors_in_the_users_modules_are_seen(tiny_cfg, tmp_path, monkeypatch, forget_modules):
    """They keep their traceback: the mistake is in the user's code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "test_broken.py").write_text("import test_missing_dependency")
    for name in ("test_broken.py", "test_broken"):
        sys.modules.pop("test_broken", None)
        tiny_cfg.IMPORTS = (name,)
        with pytest.raises(ModuleNotFoundError, match="test_missing_dependency"):
            import_user_modules(tiny_cfg)
