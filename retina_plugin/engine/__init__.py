"""Training and evaluation on Detectron2's engine."""

from .checks import check_compiler, check_config, check_devices, check_run, check_weights
from .performance import prepare_model
from .setup import (
    argument_parser,
    find_config,
    import_user_modules,
    learning_rate_warning,
    load_config,
    register_user_parts,
    setup_cfg,
)
from .trainer import Trainer

__all__ = [
    "Trainer",
    "argument_parser",
    "check_compiler",
    "check_config",
    "check_devices",
    "check_run",
    "check_weights",
    "find_config",
    "import_user_modules",
    "learning_rate_warning",
    "load_config",
    "prepare_model",
    "register_user_parts",
    "setup_cfg",
]
