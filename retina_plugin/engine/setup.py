"""From the command line to a config."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import PathManager

from retina_plugin.config import REMOVED_KEYS, add_retina_config, flatten, get_config_file
from retina_plugin.errors import ConfigError, did_you_mean

__all__ = [
    "argument_parser",
    "find_config",
    "import_user_modules",
    "learning_rate_warning",
    "load_config",
    "setup_cfg",
]


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line, but ``--num-gpus`` defaults to all that are there."""
    parser = default_argument_parser()
    parser.set_defaults(num_gpus=None)
    for action in parser._actions:
        if action.dest == "num_gpus":
            action.help = "number of GPUs per machine (default: all; 0: train on the CPU)"
        if action.dest == "config_file":
            action.required = True
    return parser


def setup_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """Defaults, then the config file with its bases, then ``KEY VALUE`` pairs, then ``IMPORTS``.

    ``OUTPUT_DIR``, where neither the file nor ``opts`` sets it, is ``output/<the file's name>``.

        cfg = setup_cfg("retina_R50_600.yaml", ["SOLVER.MAX_ITER", "1000"])

    Args:
        config_file: a file, or the name of one of the paper's configs.
        opts: keys and values in turns.

    Returns:
        A config that is not frozen.

    Raises:
        ConfigError: no such file, a file that is not YAML, a key that does not exist (with the
            nearest ones) or no longer exists (with what to do instead).
    """
    cfg = add_retina_config(get_cfg())
    default_output_dir = cfg.OUTPUT_DIR
    loaded = load_config(config_file)
    try:
        # Detectron2 merges files only, and upgrades those of an old version on the way.
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder, Path(config_file).name)
            merged.write_text(yaml.safe_dump(loaded), encoding="utf-8")
            cfg.merge_from_file(str(merged), allow_unsafe=False)
        cfg.merge_from_list(list(opts or []))
    except (KeyError, AssertionError, ValueError) as error:
        raise ConfigError(_explain(error, cfg, config_file)) from None
    if default_output_dir == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.join("output", Path(config_file).stem)
    import_user_modules(cfg)
    return cfg


def load_config(config_file: str, folder: str = "") -> dict[str, Any]:
    """The settings of a YAML file, on top of those of its ``_BASE_``.

    ``_BASE_`` is a file, seen from the folder of the file that names it, or the name of one of the
    paper's configs; or a list of these, of which later ones win.

    Args:
        config_file: a file, or a name for :func:`retina_plugin.get_config_file`.
        folder: where a relative path begins.

    Raises:
        ConfigError: no such file or config, a file that is not a YAML mapping, or bases that form
            a circle.
    """
    base, own = _base_and_own(find_config(config_file, folder), ())
    return _merge(own, base)


def find_config(name: str, folder: str = "") -> str:
    """Path or URL of a config file.

    Args:
        name: a file, or a name for :func:`retina_plugin.get_config_file`.
        folder: where a relative path begins.

    Raises:
        ConfigError: there is no such file or config.
    """
    path = os.path.join(folder, os.path.expanduser(name))
    if "://" in name or PathManager.isfile(path):
        return name if "://" in name else path
    try:
        return get_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"there is no file {path}, and {error}") from None


def _base_and_own(path: str, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file inherits, and what it sets itself."""
    if path in seen:
        raise ConfigError(f"{path} inherits itself: {' -> '.join([*seen, path])}")
    own = _read_yaml(path)
    bases = own.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        base_path = os.path.normpath(find_config(name, os.path.dirname(path)))
        inherited, settings = _base_and_own(base_path, (*seen, path))
        merged = _merge(_merge(settings, inherited), merged)
    return merged, own


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # YAML's errors have several lines
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a mapping of keys")
    return settings


def _merge(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``settings`` over it; both stay as they are."""
    merged = copy.deepcopy(base)
    for key, value in settings.items():
        if isinstance(value, dict) and key in merged:
            if not isinstance(merged[key], dict):
                raise ConfigError(f"{key} is a group of keys, but a value in a base")
            merged[key] = _merge(value, merged[key])
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _explain(error: Exception, cfg: CfgNode, config_file: str) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split())
    where = f"{config_file} or the overrides"
    key = text.rsplit(": ", 1)[-1] if text.startswith("Non-existent") else ""
    # of a group that is gone, yacs names the group
    gone = [k for k in REMOVED_KEYS if f"{k}.".startswith(f"{key}.")] if key else []
    if gone:
        return f"{where}: {gone[0]} no longer exists: {REMOVED_KEYS[gone[0]]}"
    return f"{where}: {text}{did_you_mean(key, flatten(cfg)) if key else ''}"


def learning_rate_warning(config_file: str, cfg: CfgNode) -> str | None:
    """A warning where batch size or learning rate was changed and the other was not.

    The linear scaling rule (Goyal et al., arXiv:1706.02677) changes them together. Compared are
    the file with its bases, and the overrides with the file.

    Args:
        config_file: what the run's config was loaded from.
        cfg: the run's config, overrides included.
    """
    base, own = _base_and_own(find_config(config_file), ())
    solvers = [base.get("SOLVER", {}), _merge(own, base).get("SOLVER", {}), cfg.SOLVER]
    names = [f"the bases of {config_file}", config_file]
    for before, after, where in zip(solvers, solvers[1:], names):
        if not {"BASE_LR", "IMS_PER_BATCH"} <= before.keys():
            continue
        old_rate, old_batch = before["BASE_LR"], before["IMS_PER_BATCH"]
        rate, batch = after["BASE_LR"], after["IMS_PER_BATCH"]
        if (rate == old_rate) != (batch == old_batch):
            return (
                f"SOLVER.BASE_LR {rate:g} with SOLVER.IMS_PER_BATCH {batch}: {where} has "
                f"{old_rate:g} with {old_batch}, for which linear scaling gives SOLVER.BASE_LR "
                f"{old_rate * batch / old_batch:.4g}"
            )
    return None


def import_user_modules(cfg: CfgNode) -> None:
    """Import what ``IMPORTS`` names, once a process.

    Raises:
        ConfigError: a file or module that is not there, or a file named like another module. What
            a file itself raises is not caught.
    """
    for name in cfg.IMPORTS:
        if not name.endswith(".py"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if not f"{name}.".startswith(f"{error.name}."):
                    raise  # the module is there, something that it imports is not
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
