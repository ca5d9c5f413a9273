"""Watching the other processes: which one has stopped, and what one said when it failed.

In a training each process waits for all others in every iteration. If one hangs, PyTorch ends the
others after its own time limit, and does not say which one did not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.distributed.distributed_c10d import _get_default_store

from .failures import record_error

__all__ = ["Heartbeat", "HeartbeatHook"]

_TORCH = os.path.dirname(torch.__file__)
_DISTRIBUTED = os.path.join(_TORCH, "distributed")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PACKAGES = os.path.join(_STANDARD_LIBRARY, "site-packages")
_MOST_NAMED = 8  # processes that a message names


@dataclass(frozen=True)
class _Report:
    """What a process tells the others about itself."""

    rank: int
    host: str
    pid: int
    count: int = 0  # of reports: a process whose count stands still is stopped or gone
    iteration: int | None = None  # None: between two iterations, in an evaluation, at the start
    seconds: float = 0.0  # in this iteration so far
    place: str = ""  # where its main thread is, if it has been there for long
    waits: bool = False  # for other processes
    failure: str = ""  # the line that it failed with
    done: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass
class _Others:
    """The last reports of all processes, and when each was seen to change (monotonic seconds)."""

    reports: dict[int, _Report] = field(default_factory=dict)
    changed: dict[int, float] = field(default_factory=dict)
    read: float = field(default_factory=time.monotonic)

    def update(self, reports: Mapping[int, _Report], now: float) -> None:
        for rank, report in reports.items():
            before = self.reports.get(rank)
            if before is None or before.count != report.count:
                self.changed[rank] = now
        self.reports, self.read = dict(reports), now

    def restart(self, now: float) -> None:
        """Forget what was measured so far: this process itself was stopped for a while."""
        self.changed = dict.fromkeys(self.changed, now)
        self.read = now


class Heartbeat:
    """Ends this process when another one hangs, with one line that names it.

    Each process writes a short report about itself to the store of the process group, some times in
    ``timeout``, from a thread of its own. Nothing is added to a training step. This process ends

    - when another one has written nothing for ``timeout`` seconds: it is stopped, or its machine is
      gone;
    - when every process has been in the same training iteration for ``timeout`` seconds and some
      wait for the others: one of them waits for a disk, for example.

    Between two iterations, in an evaluation and in the first iteration, which compiles, a process
    may take as long as it likes, as long as it runs.

        with Heartbeat(timeout=600) as heartbeat:
            train()

    Args:
        timeout: seconds.
    """

    _current: Heartbeat | None = None

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        # One report of each process travels to each process: rarer with many.
        self._interval = min(timeout / 5, max(1.0, comm.get_world_size() / 32))
        self._own = _Report(comm.get_rank(), socket.gethostname(), os.getpid())
        self._since = 0.0  # when this iteration began
        self._others = _Others()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        store = _get_default_store()
        self._store = store.clone()  # a store is blocked while another thread waits for a key
        self._store.set_timeout(timedelta(seconds=self.timeout))
        self._write()
        comm.synchronize()  # so that every process has written its first report
        self._read()
        for work in (self._exchange, self._decide):
            thread = threading.Thread(target=work, name=f"heartbeat{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        Heartbeat._current = self
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        Heartbeat._current = None
        self._stop.set()
        # Python aborts if a thread comes back from the store while the interpreter ends. Not for
        # ever: the process that holds the store may be stopped.
        for thread in self._threads:
            thread.join(10)
        if exc_type is None:
            self._update(done=True)

    def begin(self, iteration: int) -> None:
        """The main thread begins a training iteration."""
        with self._lock:  # the threads write it too
            self._since = time.monotonic()
            self._own = replace(self._own, iteration=iteration)

    def end(self) -> None:
        """It has finished the iteration."""
        with self._lock:
            self._own = replace(self._own, iteration=None, seconds=0.0, place="", waits=False)

    def report_failure(self, line: str) -> None:
        """Tell the others why this process ends.

        Rank 0 waits until they have read it: they cannot once it has ended, because its process
        holds the store (except under torchrun).
        """
        self._update(failure=line)
        if self._own.rank == 0:
            with contextlib.suppress(RuntimeError):
                self._read()
                self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        """Until each process that runs has read the store again."""
        begin = time.monotonic()
        counts = {rank: report.count for rank, report in self._seen()[0].items()}
        while time.monotonic() - begin < self.timeout:
            reports, changed, read = self._seen()
            # A process writes, then reads: its second report from now follows such a reading.
            waited_for = [
                r
                for r in reports.values()
                if r.rank != self._own.rank
                and not (r.failure or r.done)
                and r.count < counts[r.rank] + 2
                and read - changed[r.rank] <= 3 * self._interval  # else it has ended, too
            ]
            if not waited_for or time.monotonic() - read > 3 * self._interval:
                return
            time.sleep(self._interval / 4)

    def find_failed(self) -> _Report | None:
        """The process that ended and so broke the connection to this one; None if none is found.

        Waits a few seconds for its last report.
        """
        begin = time.monotonic()
        # Two reports may be missing by chance: the process has ended if three are.
        while time.monotonic() - begin < 4 * self._interval + 1:
            reports, changed, read = self._seen()
            others = [r for r in reports.values() if r.rank != self._own.rank and not r.done]
            for report in others:
                if report.failure:
                    return report
            for report in others:
                if read - changed[report.rank] > 3 * self._interval:
                    return report
            if time.monotonic() - read > 3 * self._interval and self._own.rank != 0:
                return reports[0]  # its process holds the store, except under torchrun
            time.sleep(self._interval / 4)
        return None

    def _seen(self) -> tuple[dict[int, _Report], dict[int, float], float]:
        """The last reports, when each was seen to change, and when they were read."""
        with self._lock:
            return self._others.reports, dict(self._others.changed), self._others.read

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._own = replace(self._own, **changes)
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
            self._write()

    def _write(self) -> None:
        with self._writing:  # else an older report could replace a newer one
            with self._lock:
                self._own = own = replace(self._own, count=self._own.count + 1)
            self._store.set(f"heartbeat/{own.rank}", json.dumps(asdict(own)))

    def _read(self) -> None:
        keys = [f"heartbeat/{rank}" for rank in range(comm.get_world_size())]
        reports = [_Report(**json.loads(text)) for text in self._store.multi_get(keys)]
        with self._lock:
            self._others.update({r.rank: r for r in reports}, time.monotonic())

    def _exchange(self) -> None:
        """Thread: write this process's report and read those of all."""
        main = threading.main_thread().ident
        # Under NCCL a process waits wherever its code next needs a number of the GPU.
        may_wait_anywhere = torch.distributed.get_backend() == "nccl"
        while not self._stop.wait(self._interval):
            own = self._own
            if own.iteration is not None:
                seconds = time.monotonic() - self._since
                frame = sys._current_frames().get(main or 0)
                place, waits = _place(frame)
                waits |= may_wait_anywhere
                with self._lock:
                    if self._own.iteration == own.iteration:
                        self._own = replace(self._own, seconds=seconds, place=place, waits=waits)
            try:
                self._write()
                self._read()
            except RuntimeError:
                continue  # the store does not answer: _decide notices

    def _decide(self) -> None:
        """Thread: end the process when another one hangs. Never waits for the store."""
        last = time.monotonic()
        while not self._stop.wait(self._interval / 2):
            now = time.monotonic()
            with self._lock:
                if now - last > 2 * self._interval:
                    self._others.restart(now)
                last = now
                verdict = _verdict(self._others, self._own, self.timeout, now)
            if verdict is not None and not self._stop.is_set():
                line, speaker = verdict
                _end(f"error: {line}", speaks=speaker == self._own.rank)


class HeartbeatHook(HookBase):
    """Tells this process's :class:`Heartbeat`, if it has one, when an iteration begins and ends.

    It stands first among the hooks: what the others do after a step is not part of the iteration.
    """

    def before_step(self) -> None:
        if Heartbeat._current is not None and self.trainer.iter > self.trainer.start_iter:
            Heartbeat._current.begin(self.trainer.iter)

    def after_step(self) -> None:
        if Heartbeat._current is not None:
            Heartbeat._current.end()


def _verdict(others: _Others, own: _Report, timeout: float, now: float) -> tuple[str, int] | None:
    """The line to end with, and the rank that prints it; None to go on."""
    running = [r for r in others.reports.values() if not r.done and not r.failure]
    unless = "A longer wait: SOLVER.PROCESS_TIMEOUT"
    if now - others.read >= timeout:
        return (
            f"no news of the other processes for {timeout:g} s: torchrun or "
            f"{others.reports[0].name} is stopped, or its machine cannot be reached. {unless}",
            own.rank,
        )
    silent = [r for r in running if others.read - others.changed[r.rank] >= timeout]
    speaker = min((r.rank for r in running if r not in silent), default=own.rank)
    if silent:
        is_are = "is" if len(silent) == 1 else "are"
        return (
            f"{_names(silent)} {is_are} stopped, or cannot be reached: no sign of life for "
            f"{timeout:g} s. {unless}",
            speaker,
        )
    culprits = [r for r in running if not r.waits]
    if any(r.seconds < timeout for r in running) or culprits == running:
        return None
    culprits = culprits or running
    places = "; ".join(f"{r.name} is in {r.place}" for r in culprits[:_MOST_NAMED])
    return (
        f"no process has finished iteration {max(r.iteration or 0 for r in running)} in "
        f"{timeout:g} s: {places}. {unless}",
        speaker,
    )


def _names(reports: list[_Report]) -> str:
    names = [report.name for report in reports[:_MOST_NAMED]]
    if len(reports) > _MOST_NAMED:
        names.append(f"{len(reports) - _MOST_NAMED} more")
    return ", ".join(names)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, in code that is neither PyTorch's nor Python's; whether it waits."""
    place, waits = "", False
    while frame is not None:
        file = frame.f_code.co_filename
        waits |= file.startswith(_DISTRIBUTED) or frame.f_code.co_name == "_engine_run_backward"
        in_python = file.startswith(_STANDARD_LIBRARY) and not file.startswith(_PACKAGES)
        if not place and not in_python and not file.startswith((_TORCH, "<")):
            place = f"{frame.f_code.co_name} ({os.path.basename(file)}:{frame.f_lineno})"
        frame = frame.f_back
    return place, waits


def _end(line: str, speaks: bool) -> None:
    """End this process, whatever its main thread waits for."""
    record_error(line)
    if speaks:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # so that the line is printed before a launcher ends all processes
    os._exit(1)
