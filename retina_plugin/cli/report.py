"""``retina report``: a page that shows what a model gets right and wrong."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from retina_plugin.analysis import analyze, write_report
from retina_plugin.data import register_datasets
from retina_plugin.engine import Trainer, check_run, setup_cfg
from retina_plugin.engine.console import console
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import FastCOCOEvaluator
from retina_plugin.optional import optional

from .model import add_model_arguments, config_and_weights
from .train import load_model

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina report",
        usage="retina report --output DIR (--dataset NAME --predictions FILE | --config-file FILE "
        "--weights FILE | --model NAME) [--against FILE] [options] [KEY VALUE ...]",
        description="Write DIR/report.html, a page that opens without a server, and "
        "DIR/report.json. AP by class, size and IoU, what errors cost, confusion, calibration, the "
        "best score thresholds, and the worst mistakes as pictures.",
        epilog="With a model, it predicts first: DIR/coco_instances_results.json. KEY VALUE pairs "
        "override its config.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="a registered dataset, or one such as coco:val.json:images/ (DATASETS.TEST)",
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="coco_instances_results.json of an evaluation, or predictions.json of `retina predict "
        "--score 0.05` (AP needs the detections of low score too)",
    )
    parser.add_argument(
        "--against", metavar="FILE", help="predictions of another model, to compare with"
    )
    parser.add_argument(
        "--score",
        type=float,
        metavar="T",
        help="count mistakes from this score on (each class: that of its best F1)",
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: dataset, predictions or model cannot be used, or do not belong together; the
            folder cannot be written.
    """
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)
    with_model = args.config_file is not None or args.model is not None
    if with_model == (args.predictions is not None):
        parser.error("give --predictions, or a model: --config-file and --weights, or --model")
    if args.config_file is not None and args.model is not None:
        parser.error("--model brings its config: leave out --config-file")
    if not with_model and (args.weights or args.opts):
        parser.error("--weights and KEY VALUE belong to a model: give --config-file too")
    if not with_model and args.dataset is None:
        parser.error("--predictions needs --dataset")
    for package in ("hotcoco", "plotly"):  # before the long work
        optional(package, "retina report")
    if with_model and args.against is not None:
        _check_against(args.against, _predictions(args.output))
    try:
        with console(0):
            if args.dataset is not None:
                register_datasets([args.dataset])
            predictions, dataset, model = args.predictions, args.dataset, ""
            if with_model:
                predictions, dataset, model = predict(args)
            analysis = analyze(dataset, predictions, args.against, score=args.score)
            page = write_report(analysis, args.output, model=model or str(predictions))
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error.strerror or error}") from None
    metrics = analysis.metrics
    shown = [f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75") if metrics[k] is not None]
    print(f"{dataset}: {', '.join(shown) or 'no AP, because there are no objects'}")
    if analysis.comparison is not None:
        ap = analysis.comparison.metrics.get("AP", {})  # none without objects
        difference, lower, upper = (ap.get(key) for key in ("difference", "lower", "upper"))
        if difference is not None and lower is not None and upper is not None:
            print(f"Against     AP {difference:+.1f} (95 % interval {lower:+.1f} to {upper:+.1f})")
    print(f"Page        {page}")


def predict(args: argparse.Namespace) -> tuple[str, str, str]:
    """Evaluate a model as ``train_net.py --eval-only`` does.

    Returns:
        The file of its detections, the dataset, and what to call the model.

    Raises:
        ConfigError: the config, its dataset or its weights cannot be used.
    """
    config, weights = config_and_weights(args)
    cfg = setup_cfg(config, args.opts)
    if weights:
        cfg.MODEL.WEIGHTS = weights
    if args.dataset is not None:
        cfg.DATASETS.TEST = (args.dataset,)
    if len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} datasets: choose one by --dataset"
        )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: give the trained weights by --weights")
    (dataset,) = cfg.DATASETS.TEST
    check_run(cfg, None, eval_only=True)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    evaluator = FastCOCOEvaluator(dataset, args.output)
    Trainer.test(cfg, load_model(cfg, resume=False), [evaluator])
    return _predictions(args.output), dataset, f"{config} with {cfg.MODEL.WEIGHTS}"


def _predictions(folder: str) -> str:
    """The file that Detectron2's evaluators write."""
    return os.path.join(folder, "coco_instances_results.json")


def _check_against(against: str, predictions: str) -> None:
    """Raise a :class:`ConfigError` if it is not there, or the model's own would replace it."""
    if not os.path.isfile(against):
        raise ConfigError(f"--against {against}: there is no such file")
    if os.path.realpath(against) == os.path.realpath(predictions):
        raise ConfigError(
            f"--against {against}: the new detections would replace it: name another --output"
        )
