"""From the command line to a config: defaults, overrides, one-line errors."""

import json
import pickle
import random
import sys

import pytest

from retina_plugin.config import REMOVED_KEYS
from retina_plugin.engine import (
    argument_parser,
    find_config,
    import_user_modules,
    learning_rate_warning,
    load_config,
    setup_cfg,
)
from retina_plugin.errors import ConfigError


def message(check, *args, **kwargs):
    """The one line that ``check`` raises."""
    with pytest.raises(ConfigError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    """``yaml_file(text, name)`` writes a config file and returns its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_command_line_is_detectron2s():
    """With all its options, and overrides at the end."""
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


def test_defaults_of_the_command_line(capsys):
    """Without --num-gpus all GPUs are used. The config file must be named."""
    args = argument_parser().parse_args(["--config-file", "a.yaml"])
    assert args.num_gpus is None
    assert not args.resume and not args.eval_only
    assert args.num_machines == 1 and args.opts == []
    with pytest.raises(SystemExit):
        argument_parser().parse_args([])
    assert "--config-file" in capsys.readouterr().err


def test_overrides_win_over_the_file_and_its_base(yaml_file):
    """And the file wins over its base."""
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
    ids=["key in file", "key", "odd", "type", "type in file", "not YAML", "no base"],
)
def test_wrong_config_raises(yaml_file, text, opts, expected):
    """One line with the file, what is wrong, and similar keys for an unknown one."""
    path = yaml_file(text or "VERSION: 2")
    found = message(setup_cfg, path, opts)
    assert path in found and expected in found
    if "NUM_CLASES" in text + "".join(opts):
        assert "did you mean 'MODEL.RETINANET.NUM_CLASSES'" in found


@pytest.mark.parametrize("key", ["IMPORTS", "DATASETS.TRAIN", "DATASETS.TEST"])
@pytest.mark.parametrize(
    ("in_file", "value"), [("null", "None"), ("[1]", "(1,)"), ("[x, null]", "('x', None)")]
)
def test_no_list_of_names_raises(yaml_file, key, in_file, value):
    """In the file and in the overrides. They are read before the values of all keys are checked."""
    group, _, name = key.rpartition(".")
    line = f"{key} must be a list of names, got {value}; [] is none"
    text = f"{group}: {{{name}: {in_file}}}" if group else f"{name}: {in_file}"
    assert message(setup_cfg, yaml_file(text)) == line
    assert message(setup_cfg, yaml_file("VERSION: 2"), [key, value]) == line


def test_missing_config_file_raises(tmp_path):
    """The message has the path. It is no config of the paper either."""
    path = str(tmp_path / "no.yaml")
    text = message(setup_cfg, path)
    assert text.startswith(f"there is no file {path}, and no config is named {path}")
    assert "did you mean 'retina_R50_600.yaml'" in message(setup_cfg, "retina_R50_60.yaml")


def test_configs_of_the_paper_by_name(yaml_file):
    """As config file and as base; a file of the same name comes first."""
    by_name = setup_cfg("retina_R50_600.yaml")
    assert by_name.dump() == setup_cfg(find_config("retina_R50_600.yaml")).dump()
    path = yaml_file("_BASE_: retina_R50_600.yaml\nOUTPUT_DIR: output/retina_R50_600")
    assert setup_cfg(path).dump() == by_name.dump()
    own = yaml_file("VERSION: 2\nSEED: 7", "retina_R50_600.yaml")
    path = yaml_file("_BASE_: retina_R50_600.yaml")
    assert load_config(path) == load_config(own) == {"VERSION": 2, "SEED": 7}


def test_later_bases_win_over_earlier_ones(yaml_file):
    """And the file itself over all of them."""
    yaml_file("SOLVER: {BASE_LR: 0.1, MAX_ITER: 1, GAMMA: 0.3}", "first.yaml")
    yaml_file("SOLVER: {BASE_LR: 0.2, MAX_ITER: 2}", "second.yaml")
    path = yaml_file("_BASE_: [first.yaml, second.yaml]\nSOLVER: {MAX_ITER: 3}")
    assert load_config(path) == {"SOLVER": {"BASE_LR": 0.2, "MAX_ITER": 3, "GAMMA": 0.3}}


def test_bases_in_a_circle_raise(yaml_file):
    """One line that names the files."""
    yaml_file("_BASE_: b.yaml", "a.yaml")
    path = yaml_file("_BASE_: a.yaml", "b.yaml")
    assert "inherits itself" in message(load_config, path)


# A value of the type that each removed key had.
REMOVED = {
    "INPUT.PAD_DIVISOR": 32,
    "SOLVER.DDP.COMPRESSION": "float16",
    "SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW": True,
    "SOLVER.DDP.STATIC_GRAPH": True,
    "SOLVER.LR_PER_IMAGE": 0.000625,
    "TEST.EVALUATOR": "COCOEvaluator",
}


@pytest.mark.parametrize("where", ["file", "base", "overrides"])
@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_removed_key_raises(yaml_file, key, where):
    """One line with the key and what to do instead."""
    assert REMOVED.keys() == REMOVED_KEYS.keys()
    nested = json.dumps(REMOVED[key])
    for name in reversed(key.split(".")):
        nested = f"{{{name}: {nested}}}"
    path = yaml_file(f"_BASE_: base.yaml\n{nested[1:-1] if where == 'file' else 'VERSION: 2'}")
    yaml_file(nested if where == "base" else "VERSION: 2", "base.yaml")
    text = message(setup_cfg, path, [key, str(REMOVED[key])] if where == "overrides" else [])
    expected = "the overrides" if where == "overrides" else path
    assert text.startswith(f"{expected}: {key} no longer exists: ")
    assert text.endswith(REMOVED_KEYS[key])


@pytest.mark.parametrize(
    ("own", "opts", "where"),
    [
        ("", [], None),
        ("", ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.005], None),
        ("", ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.006], None),
        ("", ["SOLVER.IMS_PER_BATCH", 8], "mine.yaml has 0.01 with 16"),
        ("", ["SOLVER.BASE_LR", 0.02], "mine.yaml has 0.01 with 16"),
        ("SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.005}", [], None),
        ("SOLVER: {IMS_PER_BATCH: 8}", [], "the bases of "),
        ("SOLVER: {BASE_LR: 0.02}", [], "the bases of "),
        ("SOLVER: {BASE_LR: 1e-2}", [], None),  # YAML reads it as text
        ("SOLVER: {BASE_LR: 2e-2}", [], "the bases of "),
        (
            "SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.005}",
            ["SOLVER.IMS_PER_BATCH", 4],
            "mine.yaml has 0.005 with 8",
        ),
    ],
)
def test_batch_without_its_learning_rate_gives_a_warning(yaml_file, own, opts, where):
    """If one of the two is changed alone: by the file over its base, or by the overrides."""
    yaml_file("SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.01}", "base.yaml")
    path = yaml_file(f"_BASE_: base.yaml\n{own}")
    cfg = setup_cfg(path, opts)
    text = learning_rate_warning(path, cfg)
    if where is None:
        assert text is None
        return
    rate, batch = cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH
    assert text.startswith(f"SOLVER.BASE_LR {rate:g} with SOLVER.IMS_PER_BATCH {batch}: ")
    assert where in text
    old_rate, old_batch = (0.005, 8) if "0.005 with 8" in where else (0.01, 16)
    assert text.endswith(f"linear scaling gives SOLVER.BASE_LR {old_rate * batch / old_batch:g}")


def test_config_without_batch_or_learning_rate_gives_no_warning(yaml_file):
    """Detectron2's defaults are not compared with, because nobody chose them together."""
    path = yaml_file("SOLVER: {BASE_LR: 0.01}")
    assert learning_rate_warning(path, setup_cfg(path, ["SOLVER.IMS_PER_BATCH", 2])) is None


@pytest.fixture
def forget_modules():
    """Forget the modules that a test imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_user_files_and_modules_are_imported(yaml_file, tmp_path, monkeypatch, forget_modules):
    """By setup_cfg, and only once. Their classes can be pickled."""
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
def test_wrong_imports_raise(tiny_cfg, tmp_path, monkeypatch, name, expected):
    """One line with the key. A file does not replace a module of the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").touch()
    tiny_cfg.IMPORTS = (name,)
    assert message(import_user_modules, tiny_cfg).startswith(expected)
    assert sys.modules["random"] is random


def test_errors_in_user_modules_keep_their_traceback(
    tiny_cfg, tmp_path, monkeypatch, forget_modules
):
    """Because the mistake is in the user's code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "test_broken.py").write_text("import test_missing_dependency")
    for name in ("test_broken.py", "test_broken"):
        sys.modules.pop("test_broken", None)
        tiny_cfg.IMPORTS = (name,)
        with pytest.raises(ModuleNotFoundError, match="test_missing_dependency"):
            import_user_modules(tiny_cfg)
