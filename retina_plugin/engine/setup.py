"""From the command line to a config: options, files and their bases, overrides, user modules."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import guess_version
from detectron2.engine import default_argument_parser

from retina_plugin.config import REMOVED_KEYS, add_retina_config, flatten
from retina_plugin.data import register_datasets
from retina_plugin.errors import ConfigError, did_you_mean

from .config_files import base_and_own, find_config, load_config, merge

__all__ = [
    "argument_parser",
    "find_config",
    "import_user_modules",
    "learning_rate_warning",
    "load_config",
    "register_user_parts",
    "setup_cfg",
]


_HELP = {
    "config_file": "a file, or the name of one of the paper's configs",
    "resume": "go on exactly where the last checkpoint of OUTPUT_DIR stopped",
    "eval_only": "evaluate MODEL.WEIGHTS, train nothing",
    "num_gpus": "number of GPUs per machine (default: all; 0: train on the CPU)",
    "opts": "pairs that override the config",
}
_EXAMPLES = """examples:
  {prog} --config-file retina_R50_600.yaml --num-gpus 8
  {prog} --config-file cfg.yaml MODEL.WEIGHTS model.pth SOLVER.BASE_LR 0.001
  {prog} --config-file cfg.yaml --resume
  on two machines, with --machine-rank 1 on the other:
  {prog} --config-file cfg.yaml --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line, except that ``--num-gpus`` defaults to all GPUs."""
    script = Path(sys.argv[0]).name
    prog = "python train_net.py" if script == "train_net.py" else "retina train"
    parser = default_argument_parser(epilog=_EXAMPLES.format(prog=prog))
    parser.prog = prog
    parser.set_defaults(num_gpus=None)
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
        if action.dest == "config_file":
            action.required = True
        if action.dest == "opts":
            action.metavar = "KEY VALUE"
    return parser


def setup_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """A config: the defaults, then the file with its bases, then the overrides.

    The modules of ``IMPORTS`` are imported, and datasets whose names hold a path are registered
    (see :func:`.register_datasets`). ``OUTPUT_DIR`` becomes ``output/<name of the file>`` if
    neither the file nor ``opts`` sets it.

        cfg = setup_cfg("retina_R50_600.yaml", ["SOLVER.MAX_ITER", "1000"])

    Args:
        config_file: a file, or the name of one of the paper's configs.
        opts: overrides, as [key, value, key, value, ...].

    Returns:
        A config that is not frozen.

    Raises:
        ConfigError: there is no such file, it is not YAML, a key does not exist (the message has
            similar ones) or no longer exists (it says what to do instead).
    """
    cfg = add_retina_config(get_cfg())
    default_output_dir = cfg.OUTPUT_DIR
    opts = list(opts or [])
    loaded = load_config(config_file)
    _check_groups(loaded, cfg, config_file)
    _check_removed(flatten(loaded), config_file)
    _check_removed(opts[::2], "the overrides")
    version = loaded.get("VERSION", cfg.VERSION)
    if version not in (1, cfg.VERSION):
        raise ConfigError(
            f"{config_file}: VERSION must be 1 or {cfg.VERSION}, got {version!r:.100}"
        )
    try:
        if "VERSION" not in loaded:  # Detectron2 would name the temporary file below
            loaded["VERSION"] = guess_version(CfgNode(loaded), config_file)
        # Detectron2 merges files only, and upgrades the keys of old versions while it does.
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder, Path(config_file).name)
            merged.write_text(yaml.safe_dump(loaded), encoding="utf-8")
            cfg.merge_from_file(str(merged), allow_unsafe=False)
        cfg.merge_from_list(opts)
    except (
        *(KeyError, AssertionError, ValueError, TypeError, AttributeError),
        *(RecursionError, MemoryError),  # a value of a thousand brackets
    ) as error:
        raise ConfigError(_explain(error, cfg, config_file)) from None
    if default_output_dir == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.join("output", Path(config_file).stem)
    register_user_parts(cfg)
    return cfg


def _check_groups(settings: dict[str, Any], cfg: CfgNode, path: str, prefix: str = "") -> None:
    for key, value in settings.items():
        if isinstance(cfg.get(key), CfgNode):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {prefix}{key} is a group of keys, got {value!r:.100}")
            _check_groups(value, cfg[key], path, f"{prefix}{key}.")


def _check_removed(keys: Iterable[str], where: str) -> None:
    removed = [
        f"{key} no longer exists: {REMOVED_KEYS[key]}" for key in keys if key in REMOVED_KEYS
    ]
    if removed:
        raise ConfigError(f"{where}: {'; '.join(removed)}")


def _explain(error: Exception, cfg: CfgNode, config_file: str) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split())[:500] or "a value is nested too deeply"
    key = text.rsplit(": ", 1)[-1] if text.startswith("Non-existent") else ""
    similar = did_you_mean(key, flatten(cfg)) if key else ""
    return f"{config_file} or the overrides: {text}{similar}"


def learning_rate_warning(config_file: str, cfg: CfgNode) -> str | None:
    """A warning if a run changes the batch size but not the learning rate, or the other way round.

    The linear scaling rule (Goyal et al., arXiv:1706.02677) changes them together. The file is
    compared with its bases, and the run with the file.

    Args:
        config_file: the file that the config was loaded from.
        cfg: the config of the run, with its overrides.

    Returns:
        The warning, or None.
    """
    base, own = base_and_own(config_file)
    solvers = [base.get("SOLVER", {}), merge(own, base).get("SOLVER", {}), cfg.SOLVER]
    names = [f"the bases of {config_file}", config_file]
    for before, after, where in zip(solvers, solvers[1:], names):
        if not {"BASE_LR", "IMS_PER_BATCH"} <= before.keys():
            continue
        try:  # YAML reads 1e-2 as text
            old_rate, rate = float(before["BASE_LR"]), float(after["BASE_LR"])
            old_batch, batch = int(before["IMS_PER_BATCH"]), int(after["IMS_PER_BATCH"])
        except (TypeError, ValueError):
            continue  # a base has something else there, which the file overrides
        if (rate == old_rate) != (batch == old_batch):
            return (
                f"SOLVER.BASE_LR {rate:g} with SOLVER.IMS_PER_BATCH {batch}: {where} has "
                f"{old_rate:g} with {old_batch}, for which linear scaling gives SOLVER.BASE_LR "
                f"{old_rate * batch / old_batch:.4g}"
            )
    return None


def register_user_parts(cfg: CfgNode) -> None:
    """Import ``IMPORTS``, and register the datasets whose names say where they are.

    Each process needs it, also one that was spawned with a config.

    Raises:
        ConfigError: one of these keys is not a list of names; see also
            :func:`import_user_modules` and :func:`.register_datasets`.
    """
    for key, names in (
        ("IMPORTS", cfg.IMPORTS),
        ("DATASETS.TRAIN", cfg.DATASETS.TRAIN),
        ("DATASETS.TEST", cfg.DATASETS.TEST),
    ):
        # Detectron2 lets None through, and entries of any type.
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"{key} must be a list of names, got {names!r:.100}; [] is none")
    import_user_modules(cfg)
    register_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def import_user_modules(cfg: CfgNode) -> None:
    """Import the files and modules of ``IMPORTS``. Those that are imported already are skipped.

    Raises:
        ConfigError: a file or module does not exist, or a file has the name of another module. An
            exception in the user's code is not caught.
    """
    for name in cfg.IMPORTS:
        if not name.isprintable() or not all(name.split(".")):
            raise ConfigError(f"IMPORTS: {name!r:.100} is not the name of a module or a .py file")
        if not name.endswith(".py"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if not f"{name}.".startswith(f"{error.name}."):
                    raise  # the module exists, but something that it imports does not
                raise ConfigError(
                    f"IMPORTS: no module '{name}' is installed or on PYTHONPATH"
                ) from None
            continue
        path = os.path.abspath(name)
        if not os.path.isfile(path):
            raise ConfigError(f"IMPORTS: no file {path}")
        module_name = Path(path).stem
        if module_name in sys.modules:
            if getattr(sys.modules[module_name], "__file__", None) == path:
                continue
            raise ConfigError(f"IMPORTS: {name} would hide the module '{module_name}': rename it")
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # it is a file that ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that its classes can be pickled
        spec.loader.exec_module(module)
