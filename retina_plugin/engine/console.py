"""What a run prints: a page that a person reads. Everything is in ``OUTPUT_DIR/log.txt``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

__all__ = ["LOGGERS", "console", "start_log"]

LOGGERS = ("detectron2", "fvcore", "retina_plugin")

# Deprecations in Detectron2's code, which its users cannot change. Beginnings of the messages.
_NOISE = (
    "torch.meshgrid",
    "pkg_resources is deprecated",
    "`torch.jit.script` is ",
    "`broadcast_buffers` is deprecated",
)


@contextlib.contextmanager
def console(rank: int) -> Iterator[None]:
    """Print this package's lines, and the warnings and errors of Detectron2.

    Args:
        rank: of this process among all. Only process 0 prints.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainFormatter())
    handler.addFilter(lambda record: rank == 0 and _is_for_console(record))
    logging.getLogger("retina_plugin").setLevel(logging.DEBUG)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


class _PlainFormatter(logging.Formatter):
    """The message alone; from warnings on also the level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname}: {text}"


def _is_for_console(record: logging.LogRecord) -> bool:
    if record.name == "detectron2.engine.train_loop" and record.exc_info:
        return False  # an exception that is raised again, and printed when it ends the process
    ours = record.name == "retina_plugin"
    return record.levelno >= (logging.INFO if ours else logging.WARNING)


def start_log(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``, whose lines go to ``log.txt`` only.

    It logs the environment, the command line and the config, writes ``config.yaml`` and seeds the
    random numbers. Here ``log.txt`` gets this package's lines too.
    """
    _import_cpp_extension()
    # Detectron2's console handlers write to what sys.stdout is when they are made.
    with contextlib.redirect_stdout(io.StringIO()) as unseen:
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="retina_plugin")
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream is unseen:
                logger.removeHandler(handler)


def _import_cpp_extension() -> None:
    """Import it before ``default_setup`` does, without its line "No CUDA runtime is found".

    It says so where nvcc is installed and there is no GPU: by a logger or by ``print``, as
    PyTorch's version has it.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import torch.utils.cpp_extension  # noqa: F401
    finally:
        logger.setLevel(level)
