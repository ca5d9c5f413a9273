"""Training and evaluation on Detectron2's engine."""

from .checks import check_config, check_devices, check_weights
from .setup import (
    argument_parser,
    import_user_modules,
    learning_rate_warning,
    load_config,
    setup_cfg,
)
from .trainer import Trainer

__all__ = [
    "Trainer",
    "argument_parser",
    "check_config",
    "check_devices",
    "check_weights",
    "import_user_modules",
    "learning_rate_warning",
    "load_config",
    "setup_cfg",
]
