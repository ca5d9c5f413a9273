"""``retina export --config-file X --weights W --output model.onnx``: a file that runs elsewhere."""

from __future__ import annotations

import argparse
import os
import shlex

from retina_plugin.deploy import STAGES, SUFFIXES, export_model
from retina_plugin.deploy.page import check_page, check_page_config, write_page
from retina_plugin.deploy.quantize import METHODS
from retina_plugin.deploy.runtime import format_of
from retina_plugin.engine.console import console
from retina_plugin.errors import ConfigError
from retina_plugin.predict.loading import prediction_cfg

from .model import add_model_arguments, check_model_arguments, config_and_weights

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina export",
        usage="retina export (--config-file FILE --weights FILE | --model NAME) --output FILE "
        "[options] [KEY VALUE ...]",
        description="Write a detector as one file that runs without its code, for images of any "
        "size. It is compared with the model before it is handed over.",
        epilog="KEY VALUE pairs, such as MODEL.RETINANET.SCORE_THRESH_TEST 0.3, override the "
        "config.",
    )
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help=".onnx, .pt2 or .xml")
    parser.add_argument(
        "--format", choices=SUFFIXES, help="if the ending of --output does not say it"
    )
    parser.add_argument(
        "--output-stage",
        choices=STAGES,
        default="nms",
        help="detections (nms, the default), all decoded boxes, or the head's output",
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="PATH",
        help="image, folder or dataset to compare with, may be repeated (the config's datasets)",
    )
    parser.add_argument(
        "--quantize", choices=METHODS, help="write it in 8 or 16 bit, and say what AP that costs"
    )
    parser.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="PATH",
        help="image, folder or dataset for int8, may be repeated (DATASETS.TRAIN)",
    )
    parser.add_argument(
        "--page", metavar="DIR", help="also write a web page that detects in the browser (onnx)"
    )
    parser.add_argument(
        "--page-second", metavar="FILE", help="another .onnx, which the page shows beside this one"
    )
    parser.add_argument(
        "--onnxruntime-web",
        metavar="FILE",
        help="its npm package (default: npm fetches it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: nothing can be done with these arguments, or the file is not equal.
    """
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)
    check_model_arguments(parser, args)
    if args.calibration and args.quantize != "int8":
        parser.error("--calibration is for --quantize int8")
    output = _with_suffix(args.output, args.format)
    if args.page is not None:
        if format_of(output) != "onnx" or args.output_stage != "nms":
            raise ConfigError("--page needs an .onnx of the stage nms")
        web = {
            "onnxruntime_web": args.onnxruntime_web,
            "second": args.page_second,
            "overwrite": args.overwrite,
        }
        check_page(output, args.page, **web)  # or fail at once
    elif args.page_second or args.onnxruntime_web:
        parser.error("--page-second and --onnxruntime-web are for --page DIR")
    with console(0):
        config, weights = config_and_weights(args)
        if args.page is not None:
            check_page_config(prediction_cfg(config, weights, device="cpu", opts=args.opts))
        export_model(
            config,
            weights,
            output,
            stage=args.output_stage,
            images=args.images,
            quantize=args.quantize,
            calibration=args.calibration,
            opts=args.opts,
            overwrite=args.overwrite,
        )
    print(f"Exported    {output}")
    if args.page is not None:
        page = write_page(output, args.page, **web)
        print(f"Page        {page}")
        folder = shlex.quote(args.page)
        print(f"See it      python -m http.server --bind 127.0.0.1 --directory {folder}")


def _with_suffix(output: str, kind: str | None) -> str:
    """``--output`` with the ending of ``--format``.

    Raises:
        ConfigError: it is a folder, or its own ending says another format.
    """
    if output.endswith("/") or os.path.isdir(output):
        raise ConfigError(f"--output {output} is a folder: name a file")
    if kind is None or output.lower().endswith(SUFFIXES[kind]):
        return output
    for other, suffix in SUFFIXES.items():
        if output.lower().endswith(suffix):
            raise ConfigError(f"--output {output} is a file of {other}, --format says {kind}")
    return output + SUFFIXES[kind]
