"""Reading and writing videos: by PyAV (the extra ``video``), otherwise by OpenCV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from retina_plugin.data.images import BadImageError
from retina_plugin.errors import ConfigError

from .sources import Frame

__all__ = ["Video", "VideoWriter", "open_webcam", "read_video"]

_DEFAULT_RATE = Fraction(25)


class Video:
    """An opened video: its frames per second, about how many there are, and an iterator of them.

    Args:
        rate: frames per second.
        count: by its header, which may be wrong; None if it does not say.
    """

    def __init__(self, rate: Fraction, count: int | None, frames: Iterator[Frame]) -> None:
        self.rate, self.count, self._frames = rate, count, frames

    def frames(self) -> Iterator[Frame]:
        """The frames, upright as players show them.

        Raises:
            BadImageError: the video is damaged there.
        """
        return self._frames


def pyav() -> ModuleType | None:
    """PyAV, or None if it is not installed."""
    try:
        import av
    except ImportError:
        return None
    return av


def _errors() -> tuple[type[Exception], ...]:
    """What reading and writing raise: not each of FFmpeg's errors is an OSError or a ValueError."""
    av = pyav()
    return (OSError, ValueError) if av is None else (OSError, ValueError, av.error.FFmpegError)


def read_video(path: str) -> Video:
    """Open a video file.

    Raises:
        BadImageError: it cannot be read, or has no pictures.
    """
    av = pyav()
    # FFmpeg, which OpenCV has too, takes 12:30.mp4 for a URL, but not the whole path.
    source = os.path.abspath(path) if os.path.exists(path) else path
    if av is None:
        return _open_with_opencv(source, path)
    try:
        container = av.open(source)
        stream = next(iter(container.streams.video), None)
        if stream is not None and stream.codec_context is not None:
            stream.thread_type = "AUTO"
            rate = Fraction(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)
            return Video(rate, stream.frames or None, _decode(path, container, stream))
    except _errors() as error:
        raise BadImageError(f"cannot read the video {path} ({_reason(error)})") from None
    container.close()
    if stream is None:
        raise BadImageError(f"the video {path} has no pictures")
    raise BadImageError(
        f"PyAV has no decoder for the video {path}: convert it, for example to H.264"
    )


def _decode(path: str, container: Any, stream: Any) -> Iterator[Frame]:
    with container:
        frames = container.decode(stream)
        number = 0
        while True:
            try:
                frame = next(frames)
                # rotation: counterclockwise degrees of the display matrix
                pixels = np.rot90(frame.to_ndarray(format="bgr24"), round(frame.rotation / 90))
            except StopIteration:
                break
            except _errors() as error:
                raise BadImageError(
                    f"the video {path} is damaged after {number} frames ({_reason(error)})"
                ) from None
            yield Frame(np.ascontiguousarray(pixels), path, number, frame.time)
            number += 1
    if number == 0:
        raise BadImageError(f"the video {path} has no frames")


def open_webcam(number: int) -> Video:
    """Open a webcam by its number, by OpenCV. Its frames never end.

    Raises:
        BadImageError: there is none, or it gives no picture.
    """
    return _open_with_opencv(number, None)


def _open_with_opencv(source: str | int, path: str | None) -> Video:
    name = f"the video {path}" if path is not None else f"webcam {source}"
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        raise BadImageError(f"cannot read {name}")
    rate = capture.get(cv2.CAP_PROP_FPS)
    count = round(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    exact = Fraction(rate).limit_denominator(1001) if 0 < rate < 1000 else _DEFAULT_RATE
    return Video(exact, count if count > 0 else None, _grab(capture, name, path, exact))


def _grab(capture: Any, name: str, path: str | None, rate: Fraction) -> Iterator[Frame]:
    number = 0
    try:
        while True:
            grabbed, pixels = capture.read()
            if not grabbed:
                break
            yield Frame(pixels, path, number, float(number / rate))
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise BadImageError(f"{name} has no frames")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


class VideoWriter:
    """Writes BGR frames to an MP4: H.264 by PyAV, otherwise MPEG-4 by OpenCV.

    Both store colour for squares of two pixels. So a frame with an odd side gets its last row or
    column twice. The file appears under its name when the writer is closed; until then it ends with
    ".partial.mp4".

        with VideoWriter(Path("out.mp4"), Fraction(25)) as writer:
            writer.write(frame)
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        # whole: FFmpeg takes run:1/a.mp4 for a URL
        self._partial = path.absolute().with_name(f".{path.stem}.partial.mp4")
        self._container: Any = None
        self._stream: Any = None
        self._size: tuple[int, int] | None = None  # of the first frame
        self._last_time = -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, frame: np.ndarray, seconds: float | None = None) -> None:
        """Append a frame. One of another size is resized to the first one's.

        Args:
            seconds: when it is shown; None: one frame's time after the last one. OpenCV's files
                have a constant rate.

        Raises:
            ConfigError: the encoder failed. Nothing is kept of the file.
            OSError: the folder or the disk cannot be written to.
        """
        with self._given_up_on_errors():
            self._write(frame, seconds)

    def _write(self, frame: np.ndarray, seconds: float | None) -> None:
        if self._size is None:
            self._size = frame.shape[:2]
            self._open(frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2)
        height, width = self._size
        if frame.shape[:2] != self._size:
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        if height % 2 or width % 2:
            edges = (0, height % 2, 0, width % 2)
            frame = cv2.copyMakeBorder(frame, *edges, cv2.BORDER_REPLICATE)
        if self._stream is None:
            self._container.write(frame)
            return
        av = pyav()
        assert av is not None
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="bgr24")
        time_base = self._stream.codec_context.time_base
        wanted = self._last_time + 1 if seconds is None else round(seconds / time_base)
        step = round(1 / (self.rate * time_base))
        if seconds is None and self._last_time >= 0:
            wanted = self._last_time + step
        self._last_time = picture.pts = max(wanted, self._last_time + 1)
        picture.time_base = time_base
        self._container.mux(self._stream.encode(picture))

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        av = pyav()
        if av is None:
            fourcc = cv2.VideoWriter.fourcc(*"mp4v")
            self._container = cv2.VideoWriter(
                str(self._partial), fourcc, float(self.rate), (width, height)
            )
            if not self._container.isOpened():
                raise ValueError("OpenCV cannot encode it: install the extra video (PyAV)")
            return
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._container = av.open(str(self._partial), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=self.rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        # Frames keep their times, in parts of a frame so that a changing rate fits; MPEG-4 has 16
        # bits for the number.
        parts = 16 if codec == "libx264" else 1
        self._stream.codec_context.time_base = 1 / (self.rate * parts)
        self._stream.codec_context.max_b_frames = 0

    def close(self) -> None:
        """Finish the file. Without frames there is none.

        Raises: see :meth:`write`.
        """
        if self._container is None:
            return
        with self._given_up_on_errors():
            if self._stream is None:
                self._container.release()
            else:
                self._container.mux(self._stream.encode())
                self._container.close()
            self._partial.replace(self.path)
        self._container = None

    @contextlib.contextmanager
    def _given_up_on_errors(self) -> Iterator[None]:
        """An error deletes the unfinished file. The encoder's errors name the file in one line."""
        try:
            yield
        except _errors() as error:
            self._give_up()
            if isinstance(error, OSError):
                raise
            raise ConfigError(f"cannot write the video {self.path} ({_reason(error)})") from None

    def _give_up(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            with contextlib.suppress(*_errors()):
                (container.close if self._stream is not None else container.release)()
        self._partial.unlink(missing_ok=True)
