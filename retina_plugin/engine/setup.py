"""From the command line to a config."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from retina_plugin.config import add_retina_config, flatten
from retina_plugin.errors import ConfigError

__all__ = ["argument_parser", "import_user_modules", "setup_cfg"]


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
    """Defaults, the file with its ``_BASE_``, ``KEY VALUE`` pairs; then ``IMPORTS``. Not frozen.

    ``OUTPUT_DIR``, where neither the file nor ``opts`` sets it, is ``output/<the file's name>``.

    Raises:
        ConfigError: no such file, a file that is no YAML, or a key that does not exist (with the
            nearest ones).
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"--config-file: no file {config_file}")
    cfg = add_retina_config(get_cfg())
    default_output_dir = cfg.OUTPUT_DIR
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts or []))
    except (KeyError, AssertionError, ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(_explain(error, cfg, config_file)) from None
    except (TypeError, AttributeError):  # what fvcore stumbles over: nothing, or a list
        raise ConfigError(f"{config_file} or one of its bases is no mapping of keys") from None
    if default_output_dir == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.join("output", Path(config_file).stem)
    import_user_modules(cfg)
    return cfg


def _explain(error: Exception, cfg: CfgNode, config_file: str) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = " ".join(text.split())  # YAML's errors have several lines
    key = text.rsplit(": ", 1)[-1] if text.startswith("Non-existent") else ""
    near = difflib.get_close_matches(key, list(flatten(cfg)), n=3) if key else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{config_file} or the overrides: {text}{hint}"


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
