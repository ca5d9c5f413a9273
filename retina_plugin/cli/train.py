"""``retina train --config-file X``: train or evaluate, on the CPU, one GPU, many GPUs or machines.

``--eval-only`` evaluates ``MODEL.WEIGHTS``. ``--resume`` continues from the last checkpoint of
``OUTPUT_DIR``, or evaluates it. ``KEY VALUE`` pairs at the end override the config. ``torchrun``
works too.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from typing import NoReturn

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from retina_plugin.doctor import known_classes
from retina_plugin.engine import (
    Trainer,
    argument_parser,
    check_run,
    find_config,
    learning_rate_warning,
    register_user_parts,
    setup_cfg,
)
from retina_plugin.engine.console import console, start_log
from retina_plugin.engine.finite import NonFiniteError
from retina_plugin.engine.launch import run
from retina_plugin.engine.report import draw_detections, log_results
from retina_plugin.errors import ConfigError
from retina_plugin.weights import Checkpointer

logger = logging.getLogger("retina_plugin")


def run_process(args: argparse.Namespace, cfg: CfgNode) -> None:
    """The work of each process: train or evaluate."""
    with console(comm.get_rank()):
        try:
            register_user_parts(cfg)  # again, for a process that was spawned
            start_log(cfg, args)
            logger.info("%-11s %s", "Config", shlex.join([args.config_file, *args.opts]))
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
        except NonFiniteError as error:
            fail(error, comm.get_local_rank())  # every process has it, with the same text
        except ConfigError as error:
            # Every process may print here: perhaps only this one read the broken image. If a
            # worker of the data loader raised the error, PyTorch has put the worker's traceback
            # into the message, which ends with the error.
            sys.exit(f"error: {str(error).rpartition(f'{type(error).__name__}: ')[2].strip()}")


def fail(error: Exception, local_rank: int) -> NoReturn:
    """End with one line, from one process of each machine.

    The other processes meet the same error and end with status 0. With another status, the launcher
    could stop the first process before its line is printed.
    """
    sys.exit(f"error: {error}" if local_rank == 0 else 0)


def load_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """The model with ``MODEL.WEIGHTS``, or with the last checkpoint of ``OUTPUT_DIR``."""
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    # check_datasets saw that all test sets have the same classes in the same order
    checkpointer.class_names = known_classes(cfg.DATASETS.TEST[0]) or None
    checkpointer.load_complete(cfg.MODEL.WEIGHTS, resume=resume)
    logger.info("%-11s %s", "Weights", checkpointer.loaded_from)
    return model


def evaluate(cfg: CfgNode, model: nn.Module) -> None:
    """Metrics on ``DATASETS.TEST``, and the picture of detections."""
    logger.info("%-11s %s", "Tested on", ", ".join(cfg.DATASETS.TEST))
    logger.info("%-11s %s", "Device", cfg.MODEL.DEVICE)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        draw_detections(cfg, model, os.path.join(cfg.OUTPUT_DIR, "detections.png"))
        log_results(cfg, results)
        logger.info("%-11s %s", "Log", os.path.join(cfg.OUTPUT_DIR, "log.txt"))
        verify_results(cfg, results)


def main(argv: list[str] | None = None) -> None:
    """The command: parse, check everything that needs no model, then start the processes."""
    args = argument_parser().parse_args(argv)
    # LOCAL_RANK and RANK are set by torchrun.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        with console(int(os.environ.get("RANK", args.machine_rank))):
            args.config_file = find_config(args.config_file)
            cfg = setup_cfg(args.config_file, args.opts)
            num_gpus = check_run(cfg, args.num_gpus, eval_only=args.eval_only, resume=args.resume)
            warning = None if args.eval_only else learning_rate_warning(args.config_file, cfg)
            if warning:
                logger.warning(warning)
        cfg.freeze()
        run(run_process, args, num_gpus, cfg, timeout=cfg.SOLVER.PROCESS_TIMEOUT)
    except ConfigError as error:
        fail(error, local_rank)
