"""The arguments by which commands name a detector: a config and weights, or a public model."""

from __future__ import annotations

import argparse

__all__ = ["add_model_arguments", "check_model_arguments", "config_and_weights"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", metavar="FILE", help="a file or one of the paper's configs"
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="(MODEL.WEIGHTS)")
    parser.add_argument("--model", metavar="NAME", help="a public model, instead of both")


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with the usage unless the detector is named in one of the two ways."""
    if (args.model is None) == (args.config_file is None):
        parser.error("give --config-file and --weights, or --model")
    if args.model is not None and args.weights:
        parser.error("--model brings its weights: leave out --weights")


def config_and_weights(args: argparse.Namespace) -> tuple[str, str]:
    """Both files; those of a public model are fetched first.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched.
    """
    if args.model is None:
        return args.config_file, args.weights
    from retina_plugin.weights.public_models import prepare_model  # of use here only

    return prepare_model(args.model)
