"""``retina check FILE --config-file X --weights W --dataset D``: AP of an exported file."""

from __future__ import annotations

import argparse

from retina_plugin.deploy.check import check_file
from retina_plugin.engine.console import console

from .model import add_model_arguments, check_model_arguments, config_and_weights

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina check",
        usage="retina check FILE (--config-file FILE --weights FILE | --model NAME) [options] "
        "[KEY VALUE ...]",
        description="Evaluate an exported file beside the model that it was made of: AP and time "
        "an image on the CPU.",
        epilog="KEY VALUE pairs override the config: those that the file was exported with.",
    )
    parser.add_argument("file", metavar="FILE", help=".onnx, .pt2 or .xml of retina export")
    add_model_arguments(parser)
    parser.add_argument(
        "--dataset", metavar="NAME", help="as in a config (the first of DATASETS.TEST)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="its first N images only (all)")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: nothing can be compared with these arguments.
    """
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)
    check_model_arguments(parser, args)
    with console(0):
        config, weights = config_and_weights(args)
        found = check_file(
            args.file,
            config,
            weights,
            dataset=args.dataset,
            images=args.limit,
            opts=args.opts,
            output=args.output,
        )
    print(f"{found.images:,} images of {found.dataset}")
    print(found.table())
    if args.output:
        print(f"Result      {args.output}")
