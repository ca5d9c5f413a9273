"""``retina train --config-file X``: train or evaluate, on the CPU, one GPU, many GPUs or machines.

``--eval-only`` evaluates ``MODEL.WEIGHTS``. ``--resume`` goes on from the last checkpoint of
``OUTPUT_DIR``. ``KEY VALUE`` pairs at the end override the config. ``torchrun`` works too.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing import ProcessExitedException

from retina_plugin.engine import (
    Trainer,
    argument_parser,
    check_config,
    check_devices,
    check_weights,
    import_user_modules,
    learning_rate_warning,
    setup_cfg,
)
from retina_plugin.engine.launch import run
from retina_plugin.engine.report import draw_detections
from retina_plugin.errors import ConfigError

logger = logging.getLogger("retina_plugin")


def run_process(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What every process does."""
    try:
        import_user_modules(cfg)  # again, for a process that was spawned
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="retina_plugin")
        if args.eval_only:
            model = load_model(cfg, args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    except ConfigError as error:
        fail(error, comm.get_local_rank())
    try:
        if args.eval_only:
            evaluate(cfg, model)
        else:
            trainer.train()
    except ConfigError as error:  # perhaps in this process alone: only it saw that image
        # what a loader's worker raised comes with the worker's traceback before it
        sys.exit(f"error: {str(error).rpartition('ConfigError: ')[2].strip()}")


def fail(error: ConfigError, local_rank: int) -> NoReturn:
    """One line, from one process of each machine.

    The others have met the same and end without a failure, because launchers kill what is left as
    soon as one process fails: the line could be lost.
    """
    sys.exit(f"error: {error}" if local_rank == 0 else 0)


def load_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model with ``MODEL.WEIGHTS``, or with the last checkpoint of ``OUTPUT_DIR``."""
    model = Trainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def evaluate(cfg: CfgNode, model: nn.Module) -> None:
    """Metrics on ``DATASETS.TEST``, and the sheet."""
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
        draw_detections(cfg, model, os.path.join(cfg.OUTPUT_DIR, "detections.png"))


@contextlib.contextmanager
def log_to_console() -> Iterator[None]:
    """Show what the plugin logs, as plain lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # under torchrun one process of the machine speaks for all
    logger.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", 0)) == 0 else logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(argv: list[str] | None = None) -> None:
    """The command: parse, check everything that can be checked, then start the processes."""
    args = argument_parser().parse_args(argv)
    try:
        with log_to_console():  # main() logs to the output folder, which is not known yet
            cfg = setup_cfg(args.config_file, args.opts)
            check_config(cfg, eval_only=args.eval_only)
            warning = None if args.eval_only else learning_rate_warning(args.config_file, cfg)
            if warning:
                logger.warning(warning)
            num_gpus = check_devices(cfg, args.num_gpus, args.eval_only)
            last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
            if not (args.resume and os.path.isfile(last)):  # else that is loaded, not the weights
                if args.eval_only and not cfg.MODEL.WEIGHTS:
                    raise ConfigError(
                        "--eval-only: set MODEL.WEIGHTS to the checkpoint to evaluate"
                    )
                check_weights(cfg)
        cfg.freeze()
        run(run_process, args, num_gpus, cfg)
    except ConfigError as error:
        fail(error, int(os.environ.get("LOCAL_RANK", 0)))  # set by torchrun
    except ProcessExitedException as error:
        sys.exit(error.exit_code)  # a worker has printed why
