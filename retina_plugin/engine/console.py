"""What a run prints: a page that a person reads. Everything is in ``OUTPUT_DIR/log.txt``."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from . import output

__all__ = ["LOGGERS", "console", "start_log"]

LOGGERS = ("detectron2", "fvcore", "retina_plugin")

# Deprecations in Detectron2's code, which its users cannot change. Beginnings of the messages.
_NOISE = (
    "torch.meshgrid",
    "pkg_resources is deprecated",
    "`torch.jit.script` is ",
    "`broadcast_buffers` is deprecated",
)

_unwritable: set[str] = set()  # log files of which a warning has said so


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
    random numbers. Here ``log.txt`` gets this package's lines too, and a training first makes sure
    that no other one uses ``OUTPUT_DIR``. A log that cannot be written does not stop the process.

    Raises:
        ConfigError: ``OUTPUT_DIR`` cannot be written to, or another training uses it.
    """
    _import_cpp_extension()
    folder = cfg.OUTPUT_DIR
    if args.eval_only:
        output.run_on_main_process(lambda: output.make(folder))
    else:
        output.run_on_main_process(lambda: output.claim(folder))
    # Detectron2's console handlers write to what sys.stdout is when they are made.
    with contextlib.redirect_stdout(io.StringIO()) as unseen:
        try:
            default_setup(cfg, args)
            setup_logger(folder, distributed_rank=comm.get_rank(), name="retina_plugin")
        except OSError as error:
            raise output.unusable(folder, error) from None
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream is unseen:
                logger.removeHandler(handler)
            elif isinstance(handler, logging.StreamHandler) and handler.stream is not sys.stdout:
                _survive_errors(handler)


def _survive_errors(handler: logging.StreamHandler) -> None:
    """One warning instead of a traceback for each line that cannot be written to ``log.txt``."""
    handle_error = handler.handleError

    def warn_once(record: logging.LogRecord) -> None:
        error, path = sys.exc_info()[1], getattr(handler.stream, "name", "the log")
        if not isinstance(error, OSError):
            handle_error(record)
        elif path not in _unwritable:
            _unwritable.add(path)
            text = "cannot write %s: %s. The training goes on"
            logging.getLogger("retina_plugin").warning(text, path, error.strerror or error)

    handler.handleError = warn_once  # type: ignore[method-assign]
    # Before Detectron2 closes the file at exit, which writes what is left of it.
    atexit.register(_close, handler.stream)


def _close(stream: TextIO) -> None:
    with contextlib.suppress(OSError):
        stream.close()


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
