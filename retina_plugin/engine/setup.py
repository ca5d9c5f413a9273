"""From the command line to a config: options, files and their bases, overrides, user modules."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import logging
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

logger = logging.getLogger("retina_plugin")


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line, except that ``--num-gpus`` defaults to all GPUs."""
    parser = default_argument_parser()
    parser.set_defaults(num_gpus=None)
    for action in parser._actions:
        if action.dest == "num_gpus":
            action.help = "number of GPUs per machine (default: all; 0: train on the CPU)"
        if action.dest == "config_file":
            action.required = True
    return parser


def setup_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """A config: the defaults, then the file with its bases, then the overrides.

    The modules of ``IMPORTS`` are imported. ``OUTPUT_DIR`` becomes ``output/<name of the file>`` if
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
    if "VERSION" not in loaded:  # Detectron2 would name the temporary file below
        loaded["VERSION"] = guess_version(CfgNode(loaded), config_file)
    try:
        # Detectron2 merges files only, and upgrades the keys of old versions while it does.
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder, Path(config_file).name)
            merged.write_text(yaml.safe_dump(loaded), encoding="utf-8")
            cfg.merge_from_file(str(merged), allow_unsafe=False)
        cfg.merge_from_list(opts)
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(_explain(error, cfg, config_file)) from None
    if default_output_dir == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.join("output", Path(config_file).stem)
    import_user_modules(cfg)
    return cfg


def load_config(config_file: str) -> dict[str, Any]:
    """The settings of a YAML file, merged over those of its ``_BASE_``.

    ``_BASE_`` is a file, relative to the folder of the file that names it, or the name of one of
    the paper's configs. It may be a list of these; later ones win.

    Args:
        config_file: a file, or a name for :func:`retina_plugin.get_config_file`.

    Raises:
        ConfigError: there is no such file or config, it is not a YAML mapping, or its bases form a
            circle.
    """
    base, own = _base_and_own(find_config(config_file), ())
    return _merge(own, base)


def find_config(name: str, folder: str = "") -> str:
    """Path or URL of a config file.

    Args:
        name: a file, or a name for :func:`retina_plugin.get_config_file`.
        folder: a relative path is relative to it.

    Raises:
        ConfigError: there is no such file or config.
    """
    path = name if "://" in name else os.path.join(folder, os.path.expanduser(name))
    if "://" in path:
        return path
    if PathManager.isfile(path):
        return os.path.normpath(path)
    try:
        return get_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"there is no file {path}, and {error}") from None


def _base_and_own(path: str, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that a file inherits, and those that it has itself."""
    if path in seen:
        raise ConfigError(f"{path} inherits itself: {' -> '.join([*seen, path])}")
    own = _read_yaml(path)
    bases = own.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        try:
            base_path = find_config(name, os.path.dirname(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: _BASE_: {error}") from None
        inherited, settings = _base_and_own(base_path, (*seen, path))
        merged = _merge(_merge(settings, inherited), merged)
    return merged, own


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            text = file.read()
        settings = yaml.safe_load(text)
    except yaml.constructor.ConstructorError:
        # Detectron2's own RetinaNet config computes anchor sizes by a tag that runs Python code.
        logger.warning("%s has YAML tags that run Python code: use it only if you trust it", path)
        settings = yaml.unsafe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # The error of the YAML parser has several lines.
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a mapping of keys")
    _check_keys(settings, path)
    bases = settings.get("_BASE_", [])
    if not isinstance(bases, (str, list)) or not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{path}: _BASE_ must be a file or a list of files, got {bases}")
    return settings


def _check_groups(settings: dict[str, Any], cfg: CfgNode, path: str, prefix: str = "") -> None:
    for key, value in settings.items():
        if isinstance(cfg.get(key), CfgNode):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {prefix}{key} is a group of keys, got {value!r}")
            _check_groups(value, cfg[key], path, f"{prefix}{key}.")


def _check_keys(settings: dict[Any, Any], path: str) -> None:
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not a name")
        if isinstance(value, dict):
            _check_keys(value, path)


def _merge(settings: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with ``settings`` merged over it."""
    merged = copy.deepcopy(base)
    for key, value in settings.items():
        if isinstance(value, dict) and key in merged:
            if not isinstance(merged[key], dict):
                raise ConfigError(f"{key} is a group of keys, but a value in a base")
            merged[key] = _merge(value, merged[key])
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _check_removed(keys: Iterable[str], where: str) -> None:
    removed = [
        f"{key} no longer exists: {REMOVED_KEYS[key]}" for key in keys if key in REMOVED_KEYS
    ]
    if removed:
        raise ConfigError(f"{where}: {'; '.join(removed)}")


def _explain(error: Exception, cfg: CfgNode, config_file: str) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split())
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
    base, own = _base_and_own(find_config(config_file), ())
    solvers = [base.get("SOLVER", {}), _merge(own, base).get("SOLVER", {}), cfg.SOLVER]
    names = [f"the bases of {config_file}", config_file]
    for before, after, where in zip(solvers, solvers[1:], names):
        if not {"BASE_LR", "IMS_PER_BATCH"} <= before.keys():
            continue
        # YAML reads 1e-2 as text.
        old_rate, rate = float(before["BASE_LR"]), float(after["BASE_LR"])
        old_batch, batch = int(before["IMS_PER_BATCH"]), int(after["IMS_PER_BATCH"])
        if (rate == old_rate) != (batch == old_batch):
            return (
                f"SOLVER.BASE_LR {rate:g} with SOLVER.IMS_PER_BATCH {batch}: {where} has "
                f"{old_rate:g} with {old_batch}, for which linear scaling gives SOLVER.BASE_LR "
                f"{old_rate * batch / old_batch:.4g}"
            )
    return None


def import_user_modules(cfg: CfgNode) -> None:
    """Import the files and modules of ``IMPORTS``. Those that are imported already are skipped.

    Raises:
        ConfigError: a file or module does not exist, or a file has the name of another module. An
            exception in the user's code is not caught.
    """
    for name in cfg.IMPORTS:
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
