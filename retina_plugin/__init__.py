"""RetinaNet and the focal loss (Lin et al., ICCV 2017) for Detectron2.

Importing the package registers its components; ``add_retina_config(cfg)`` adds its config keys.
"""

import sys
import warnings
from pathlib import Path

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    message = (
        "Detectron2 is missing: run `make setup` in the checkout, or install it as the README says "
        "under 'Install'"
    )
    if Path(sys.argv[0]).stem == "retina":  # the command prints one line, as for every mistake
        sys.exit(f"error: {message}")
    raise ModuleNotFoundError(message, name="detectron2") from None

with warnings.catch_warnings():
    # Detectron2 and fvcore use it at import, and their users cannot change that.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is ")
    from . import data, losses, modeling
from .config import add_retina_config, get_config_file

__version__ = "0.1.0"

__all__ = ["add_retina_config", "data", "get_config_file", "losses", "modeling"]
