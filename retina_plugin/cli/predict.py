"""``retina predict --config-file X --weights W INPUT ... --output out``: detect and draw.

Writes ``predictions.json`` (COCO's result list), ``images/`` and ``videos/``. A file that cannot be
read is named and left out, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg
from tqdm import tqdm

from retina_plugin.config import add_retina_config
from retina_plugin.engine.console import console
from retina_plugin.errors import ConfigError, one_line
from retina_plugin.predict import Predictions, RetinaPredictor
from retina_plugin.predict.sources import Frame, describe, find_inputs, is_video, read_frames
from retina_plugin.predict.video import VideoWriter, open_webcam, read_video
from retina_plugin.predict.writers import CsvFile, FileNames, ImageIds, JsonList, write_image

from .model import add_model_arguments, check_model_arguments

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retina predict",
        usage="retina predict (--config-file FILE --weights FILE | --model NAME) INPUT ... "
        "[options] [KEY VALUE ...]",
        description="Detect in images, folders, videos and webcams.",
        epilog="KEY VALUE pairs, such as MODEL.RETINANET.NMS_THRESH_TEST 0.6, override the config.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, folder, 'pattern', video, webcam number"
    )
    add_model_arguments(parser)
    parser.add_argument("--output", default="predictions", metavar="DIR", help="(predictions)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score (default: .3)")
    parser.add_argument(
        "--classes", metavar="A,B", help='names of the classes to keep; one with a comma in ""'
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (1)")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="detect in tiles of this side")
    parser.add_argument("--overlap", type=float, default=0.2, help="of tiles (default: .2)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--csv", action="store_true", help="also write predictions.csv")
    parser.add_argument("--no-images", action="store_true", help="draw nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: nothing can be done with these arguments.
    """
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)  # inputs before, between and after the options
    args.inputs, args.opts = _split_overrides(args.inputs)
    check_model_arguments(parser, args)
    with console(0):
        run = _Run(args)
        drawn = [run.output / "images", run.output / "videos"]
        sources = find_inputs(args.inputs, run.failed, not_in=drawn)
        if not sources:
            raise ConfigError("there is nothing to detect in")
        if run.draws:
            _check_not_overwritten(sources, drawn)
        predictor = _predictor(args)
        try:
            run(predictor, sources)
        except OSError as error:
            raise ConfigError(
                f"--output: cannot write {args.output} ({error.strerror or error})"
            ) from None
    if run.stopped.is_set():
        sys.exit(130)
    if run.failures:
        sys.exit(1)


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Inputs, and the KEY VALUE pairs after them: from the first word like MODEL.DEVICE on."""
    groups = add_retina_config(get_cfg())
    for i, word in enumerate(words):
        group, dot, _ = word.partition(".")
        is_key = bool(dot) and group in groups and not glob.has_magic(word)
        if is_key and not Path(word).exists() and (len(words) - i) % 2 == 0:
            return words[:i], words[i:]
    return words, []


def _check_not_overwritten(sources: list[str | int], drawn: list[Path]) -> None:
    """Raise a :class:`ConfigError` if drawn images would replace images that are inputs."""
    folders = {os.path.realpath(folder) for folder in drawn}
    for source in sources:
        if isinstance(source, str) and os.path.realpath(os.path.dirname(source)) in folders:
            raise ConfigError(
                f"--output: a drawn image could replace the input {source}: choose another folder"
            )


def _predictor(args: argparse.Namespace) -> RetinaPredictor:
    options: dict[str, Any] = {
        "device": args.device,
        "score": args.score,
        "classes": None if args.classes is None else _names(args.classes),
        "batch_size": args.batch,
        "tile": args.tile,
        "overlap": args.overlap,
        "opts": args.opts,
    }
    if args.model is not None:
        return RetinaPredictor.from_model(args.model, **options)
    return RetinaPredictor.load(args.config_file, args.weights, **options)


def _names(text: str) -> list[str]:
    """Names between commas or in lines; one that has a comma itself stands in double quotes.

    Raises:
        ConfigError: the text cannot be taken apart.
    """
    lines = [line.strip().removesuffix(",") for line in text.splitlines() if line.strip()]
    reader = csv.reader([",".join(lines) or " "], skipinitialspace=True)
    try:
        return [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise ConfigError(f"--classes: {error}: give names with commas between them") from None


class _Run:
    """One call of the command: what is written, and what failed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output, self.csv, self.draws = Path(args.output), args.csv, not args.no_images
        self.failures = 0
        self.stopped = threading.Event()
        self._image_names, self._video_names = FileNames(), FileNames()

    def failed(self, source: Any, error: Exception) -> None:
        """Name what was left out."""
        self.failures += 1
        text, name = str(error), describe(source)
        tqdm.write(one_line(f"left out: {text if name in text else f'{name}: {text}'}"), sys.stderr)

    def __call__(self, predictor: RetinaPredictor, sources: list[str | int]) -> None:
        images = [s for s in sources if isinstance(s, str) and not is_video(s)]
        videos = [s for s in sources if not isinstance(s, str) or is_video(s)]
        self._ids = ImageIds(images)
        self.output.mkdir(parents=True, exist_ok=True)
        number = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(_stop_on_signal(self.stopped))
            self._json = stack.enter_context(JsonList(self.output / "predictions.json"))
            self._table = (
                stack.enter_context(CsvFile(self.output / "predictions.csv")) if self.csv else None
            )
            if images:
                found = predictor.run(read_frames(images, self.failed), self.failed)
                for frame, detections in self._progress(found, len(images), "images"):
                    number += len(detections)
                    self._write_image(frame, detections)
            for source in videos:
                if not self.stopped.is_set():
                    number += self._write_video(predictor, source)
        print(f"{number:,} detections: {self.output / 'predictions.json'}")
        if self.failures:
            were = "input was" if self.failures == 1 else "inputs were"
            print(f"{self.failures:,} {were} left out", file=sys.stderr)

    def _progress(
        self, found: Any, total: int | None, what: str
    ) -> Iterator[tuple[Frame, Predictions]]:
        """The pairs of :meth:`RetinaPredictor.run` with a progress bar, until a signal comes."""
        bar = tqdm(total=total, unit="image", desc=what, disable=None)  # None: not in a file
        with contextlib.closing(found), bar:
            for pair in found:
                yield pair
                bar.update()
                if self.stopped.is_set():
                    return

    def _record(self, frame: Frame, found: Predictions, name: str) -> None:
        entries = found.to_coco(self._ids.of(frame.path if frame.number is None else None))
        for entry in entries:
            entry["file_name"] = name
            if frame.number is not None:
                entry["frame"] = frame.number
        self._json.write(entries)
        if self._table is not None:
            self._table.write(found, entries)

    def _write_image(self, frame: Frame, found: Predictions) -> None:
        path = str(frame.path)
        self._record(frame, found, path)
        if self.draws:
            folder = self.output / "images"
            folder.mkdir(exist_ok=True)
            drawn = folder / self._image_names.image(path, found.image_size)
            try:
                write_image(drawn, found.draw(frame.pixels))
            except ConfigError as error:
                self.failed(path, ConfigError(f"{path} is not drawn: {error}"))

    def _write_video(self, predictor: RetinaPredictor, source: str | int) -> int:
        name = source if isinstance(source, str) else f"webcam_{source}"
        number = 0
        try:
            video = open_webcam(source) if isinstance(source, int) else read_video(source)
            with contextlib.ExitStack() as stack:
                writer = None
                if self.draws:
                    path = self.output / "videos" / self._video_names.video(name)
                    writer = stack.enter_context(VideoWriter(path, video.rate))
                found = predictor.run(video.frames(), self.failed)
                for frame, detections in self._progress(found, video.count, Path(name).name):
                    number += len(detections)
                    self._record(frame, detections, name)
                    if writer is not None:
                        writer.write(detections.draw(frame.pixels), frame.seconds)
        except ConfigError as error:  # the frames before the damage are written
            self.failed(source, error)
        return number


@contextlib.contextmanager
def _stop_on_signal(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the image at hand; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, stop)) for number in signals]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
