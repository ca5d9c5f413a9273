"""``retina doctor --config-file X``: check a config, its datasets and its images before training.

Every image is read, the anchors are compared with the boxes, and a training step is measured.
``--quick`` leaves out the images and the step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from tabulate import tabulate
from tqdm import tqdm

from retina_plugin.doctor import (
    Report,
    Severity,
    check_batch_size,
    check_images,
    check_weights,
    examine_training,
    named_quick_checks,
    write_report,
)
from retina_plugin.doctor.schedule import check_scaled
from retina_plugin.engine import check_devices, find_config, setup_cfg
from retina_plugin.engine.console import console
from retina_plugin.engine.timing import measure_step
from retina_plugin.errors import ConfigError, one_line

__all__ = ["argument_parser", "examine", "main"]

_LINES = 4  # of progress, where there is no terminal
_NARROW, _WIDE = 40, 120  # columns of the text: a finding stays readable


def examine(cfg: CfgNode, report: Report, *, quick: bool = False) -> None:
    """Run all checks; ``quick`` leaves out the images and the timed step."""
    for name, check in named_quick_checks(cfg).items():
        report.run(name, check)
    report.run("weights", lambda: check_weights(cfg, read=not quick))
    try:
        processes = max(check_devices(cfg, None), 1)
    except ConfigError:
        processes = 1  # the check of the machine has said why
    if not report.has_error("SOLVER."):
        # From here on, the numbers are those of the training that would run on this machine.
        written, cfg = cfg, DefaultTrainer.auto_scale_workers(cfg, processes)
        report.run(
            "batch", lambda: (*check_scaled(written, cfg), *check_batch_size(cfg, processes))
        )
    if not quick:
        report.run("images", lambda: check_images(cfg, progress=_progress()))
    time_step = None if quick else partial(measure_step, cfg, processes)
    examine_training(cfg, report, time_step, processes=processes)


def _progress() -> Callable[[int, int], None]:
    """A bar on a terminal; elsewhere a line now and then."""
    if not sys.stdout.isatty():
        return _print_progress
    bar = tqdm(desc="images", unit="", file=sys.stdout, leave=False)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _print_progress(done: int, total: int) -> None:
    if done * _LINES // total > (done - 1) * _LINES // total:
        _print(f"images: {done:,} of {total:,} read")


def table(report: Report) -> str:
    """The findings as text, errors first."""
    width = min(shutil.get_terminal_size().columns, _WIDE) - len("warning") - 2
    rows = []
    for _, finding in report.sorted_findings():
        lines = [finding.where, finding.what] + [f"-> {finding.fix}"] * bool(finding.fix)
        # Names in the data may hold line breaks, or signs that a terminal obeys.
        rows.append([finding.severity.value, "\n".join(map(one_line, lines))])
    return tabulate(
        rows,
        ["", "where: what, and what to do"],
        tablefmt="simple",
        maxcolwidths=[None, max(width, _NARROW)],
        disable_numparse=True,
    )


def _print(text: str) -> None:
    """Print what the terminal's encoding does not have as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina doctor",
        description="Check a config, its datasets, images and anchors before a training.",
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a file or one of the paper's configs"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="for doctor.html and doctor.json (OUTPUT_DIR/doctor)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="read no images and measure no training step"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the findings, write ``doctor.json`` and ``doctor.html``; status 1 if there are errors.

    Raises:
        ConfigError: a config that cannot be read, or a folder that cannot be written.
    """
    args = argument_parser().parse_args(argv)
    with console(0):
        config_file = find_config(args.config_file)
        cfg = setup_cfg(config_file, args.opts)
        report = Report(config_file, tuple(args.opts))
        examine(cfg, report, quick=args.quick)
    folder = args.output or os.path.join(cfg.OUTPUT_DIR, "doctor")
    _print(table(report))
    if report.suggestion:
        _print(f"\nSuggested anchors:\n\n{report.suggestion.yaml()}")
    _print(f"\n{report.summary()}")
    try:
        json_file, page = write_report(report, folder)
    except OSError as error:
        raise ConfigError(
            f"--output: cannot write {folder} ({error.strerror}): name another folder"
        ) from None
    _print(f"{page}\n{json_file}")
    if report.count(Severity.ERROR):
        sys.exit(1)
