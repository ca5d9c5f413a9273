"""Signals that ask a training to save and to stop: SIGTERM, SIGINT and SIGUSR1.

A scheduler sends one before it takes the machine away, and a user presses Ctrl-C.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

__all__ = ["EXIT_CODE", "Interrupted", "StopRequests", "pass_signals_on"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal and SLURM signal all processes, and torchrun or `launch` pass the signal on: a process
# gets it twice. What comes within so many seconds is one request.
_ONE_REQUEST = 3.0


class Interrupted(SystemExit):
    """A signal ended the training. It is saved, and the process ends with exit code 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequests:
    """Notes the signals that a training gets, until the end of the ``with`` block.

    A second signal ends the process at once. Outside the main thread no signal is noted, because
    Python admits no handler there.

        with StopRequests() as requests:
            for iteration in range(max_iter):
                run_step()
                if requests.agreed():  # in all processes after the same iteration
                    save()
                    raise Interrupted
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that this process got."""
        self._received_at = 0.0
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._exchange: tuple[Any, Tensor] | None = None

    def __enter__(self) -> StopRequests:
        if comm.get_world_size() > 1:
            # gloo works on the CPU, so nothing waits for a GPU. One process may evaluate for long
            # while the others wait here; a process that hangs is the heartbeat's business.
            limit = datetime.timedelta(days=1)
            self._group = torch.distributed.new_group(backend="gloo", timeout=limit)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._group is not None and exc_info[0] is None:
            self._finish_exchange()
            torch.distributed.destroy_process_group(self._group)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            if self._raises:
                self._raises = False
                raise Interrupted
        elif time.monotonic() - self._received_at > _ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextlib.contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Raise :class:`Interrupted` in this block as soon as a signal comes."""
        if self.received is not None:
            raise Interrupted
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def agreed(self) -> bool:
        """Whether some process got a signal. All must call it after each iteration.

        With several processes the answer is that of the call before, which has travelled in the
        meantime: the training waits for nothing, and all stop after the same iteration.
        """
        if self._group is None:
            return self.received is not None
        if self._finish_exchange():
            return True
        request = torch.tensor([int(self.received is not None)])
        work = torch.distributed.all_reduce(request, group=self._group, async_op=True)
        self._exchange = (work, request)
        return False

    def _finish_exchange(self) -> bool:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return False
        work, request = exchange
        work.wait()
        return request.item() > 0


@contextlib.contextmanager
def pass_signals_on() -> Iterator[None]:
    """Pass these signals on to the processes that this one has started, and wait for their end.

    Without such processes, a signal does what it did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, number)
        if not children:
            before = previous[signal.Signals(number)]
            if callable(before):
                before(number, frame)
            else:
                signal.signal(number, before)
                signal.raise_signal(number)

    for each in _SIGNALS:
        previous[each] = signal.signal(each, handle)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
