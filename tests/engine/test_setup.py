"""From the command line to a config: defaults, overrides, one-line errors."""

import pickle
import random
import sys

import pytest

from retina_plugin.engine import argument_parser, import_user_modules, setup_cfg
from retina_plugin.errors import ConfigError


def message(check, *args, **kwargs):
    """The one line that ``check`` raises."""
    with pytest.raises(ConfigError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


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
