"""RetinaNet and the focal loss (Lin et al., ICCV 2017) for Detectron2.

Importing the package registers its components; ``add_retina_config(cfg)`` adds its config keys.
"""

import os
import sys
import warnings
from pathlib import Path

# GNU OpenMP, which PyTorch's CPU wheels use, lets a thread that waits for others spin for long: if
# anything else runs on the CPU, each step takes several times as long. It reads its variables when
# torch is imported, so this is the last moment. A user's own choice stands, and so does that of a
# program that has imported torch itself.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

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
    from . import analysis, data, losses, modeling
from .config import add_retina_config, get_config_file

__version__ = "0.1.0"

__all__ = ["add_retina_config", "analysis", "data", "get_config_file", "losses", "modeling"]
