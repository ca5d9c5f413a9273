"""The commands: ``retina NAME ...``, or ``python -m retina_plugin NAME ...``.

Each command is a file of this folder with ``main(argv)``. It parses, calls the package and prints.
``model.py`` has the arguments that several commands share.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from retina_plugin import __version__
from retina_plugin.errors import ConfigError

__all__ = ["COMMANDS", "main"]

# Name -> what it does. The module is imported only when its command is called.
COMMANDS = {
    "train": "train or evaluate a config (the same as train_net.py)",
    "predict": "detect in images, folders, videos and webcams",
    "export": "write a detector as ONNX, pt2 or OpenVINO, compared with the model",
    "check": "evaluate an exported file beside the model that it was made of",
    "report": "show on a page what a model gets right and wrong",
    "init": "write the config for a dataset and this machine, each value with its reason",
    "doctor": "check a config, its datasets, images and anchors before a training",
    "split": "make a training and a validation set of one dataset",
    "convert": "convert the weights of another library, with the config that belongs to them",
    "replay": "repeat a training step whose loss or gradient was not finite",
    "diff": "show which keys differ between two configs",
}


def main(argv: list[str] | None = None) -> None:
    """Run one command. A :class:`ConfigError` becomes one line and exit status 1."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="retina",
        description="RetinaNet and the focal loss for Detectron2.",
        epilog="\n".join(
            ["commands:", *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())]
            + ["", "`retina COMMAND --help` explains a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"retina_plugin {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    # Only the first word is ours: everything after it belongs to the command.
    arguments = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(arguments[:1]).command
    try:
        importlib.import_module(f"{__name__}.{command}").main(arguments[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
