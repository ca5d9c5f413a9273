"""Draw the paper's figures, as PNG and SVG, with the numbers in them as CSV.

    python -m reproduction.figures fig1 fig5 fig6
    python -m reproduction.figures fig4 --config-file my.yaml --weights model_final.pth
    python -m reproduction.figures fig2 --points mine.csv

All losses are computed by the package's own functions. `python reproduction/figures.py fig1` is the
same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

if __name__ == "__main__" and not __package__:  # run as a file: the checkout is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduction.ledger import LEDGER
from reproduction.plots import curves, speed, star, trained_model
from reproduction.plots.style import STYLE, Plot, save
from retina_plugin.errors import ConfigError, check_choice

__all__ = ["FIGURES", "argument_parser", "main"]

Draw = Callable[[argparse.Namespace], Plot]

# Name -> what it shows, and the function that draws it.
FIGURES: dict[str, tuple[str, Draw]] = {
    "fig1": ("FL over p_t, by gamma", lambda args: curves.focal_by_gamma()),
    "fig2": ("speed against AP", lambda args: speed.speed_and_accuracy(args.points)),
    "fig4": (
        "how a trained model's loss is distributed over easy and hard samples",
        lambda args: trained_model.draw(args.config_file, args.weights, args.dataset, args.images),
    ),
    "fig5": ("CE, FL and FL* over x_t", lambda args: curves.variants()),
    "fig6": ("their derivatives", lambda args: curves.derivatives()),
    "fig7": ("FL* by gamma and beta, and which work", lambda args: star.settings(args.ledger)),
    "table1e": ("AP and time by image size", lambda args: speed.by_image_size()),
}


def argument_parser() -> argparse.ArgumentParser:
    names = [f"  {name:8} {what}" for name, (what, _) in FIGURES.items()]
    parser = argparse.ArgumentParser(
        prog="python -m reproduction.figures",
        description="Draw the paper's figures, as PNG and SVG, with the numbers in them as CSV.",
        epilog="\n".join(["names:", *names, "  all      all of them"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="fig1, ... or all")
    parser.add_argument("--output", type=Path, default=Path("output/figures"), metavar="DIR")
    model = parser.add_argument_group("fig4")
    model.add_argument(
        "--config-file",
        default=trained_model.DEMO,
        metavar="FILE",
        help="of the trained model (default: the demo's)",
    )
    model.add_argument(
        "--weights", metavar="FILE", help="(default: model_final.pth in the config's OUTPUT_DIR)"
    )
    model.add_argument("--dataset", metavar="NAME", help="(default: the first of DATASETS.TEST)")
    model.add_argument(
        "--images", type=int, metavar="N", help="so many of its images, chosen at random"
    )
    parser.add_argument_group("fig2").add_argument(
        "--points", type=Path, metavar="FILE", help="your own models: .csv or .json, name, ms, AP"
    )
    parser.add_argument_group("fig7").add_argument(
        "--ledger", type=Path, default=LEDGER, metavar="FILE", help="results (docs/ledger.json)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    try:
        for name in args.names:
            check_choice("NAME", name, [*FIGURES, "all"])
        names = list(FIGURES) if "all" in args.names else list(dict.fromkeys(args.names))
        if "fig4" in names:  # found missing at once, not after the others
            args.weights = trained_model.find_weights(args.config_file, args.weights)
        for name in names:
            with matplotlib.rc_context(STYLE):
                plot = FIGURES[name][1](args)
                print(f"{name:8}", *save(plot, args.output, name))
            if plot.text:
                print(plot.text)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
