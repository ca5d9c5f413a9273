"""Batches of images that the network sees in one size, and reading ahead of it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from detectron2.structures import ImageList

__all__ = ["grouped", "padded_size", "read_ahead"]

_LOOK_AHEAD = 4  # batches that are waited for to find images of one size
_MAX_BYTES = 2**28  # of the images that wait, except that one always may

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class _Waiting(Generic[T, R]):
    item: T
    key: Hashable
    size: int
    result: R | None = None
    done: bool = False


def grouped(
    items: Iterable[T],
    *,
    key: Callable[[T], Hashable],
    size: Callable[[T], int],
    run: Callable[[list[T]], list[R]],
    batch_size: int,
) -> Iterator[tuple[T, R]]:
    """Results in the order of the items, which are computed in batches of items with equal keys.

    An item waits until a batch is full, or until four batches of items (or 256 MB) wait, or until
    there are no more. So memory is bounded, and a batch may be smaller than ``batch_size``.

    Args:
        key: items with equal keys may share a batch.
        size: bytes of an item.
        run: a batch of items -> their results.
        batch_size: most items of a batch.
    """
    waiting: deque[_Waiting[T, R]] = deque()

    def run_group(group: Hashable) -> None:
        batch = [w for w in waiting if not w.done and w.key == group][:batch_size]
        for entry, result in zip(batch, run([w.item for w in batch]), strict=True):
            entry.result, entry.done = result, True

    def finished() -> Iterator[tuple[T, R]]:
        while waiting and waiting[0].done:
            entry = waiting.popleft()
            yield entry.item, entry.result  # type: ignore[misc]

    for item in items:
        waiting.append(_Waiting(item, key(item), size(item)))
        same = sum(not w.done and w.key == waiting[-1].key for w in waiting)
        if same == batch_size:
            run_group(waiting[-1].key)
            yield from finished()
        while waiting and (
            len(waiting) >= _LOOK_AHEAD * batch_size or sum(w.size for w in waiting) > _MAX_BYTES
        ):
            run_group(waiting[0].key)
            yield from finished()
    while waiting:
        run_group(waiting[0].key)
        yield from finished()


def padded_size(image: torch.Tensor, divisibility: int, square_size: int) -> tuple[int, int]:
    """Height and width of the batch that Detectron2's ``ImageList`` makes of this image alone.

    Images of one padded size share a batch without changing each other's features.
    """
    constraints = {"square_size": square_size} if square_size > 0 else None
    # meta: the shape is wanted, and no pixel
    alone = ImageList.from_tensors(
        [image.to("meta")], divisibility, padding_constraints=constraints
    )
    height, width = alone.tensor.shape[-2:]
    return height, width


def read_ahead(items: Iterable[T], number: int) -> Iterator[T]:
    """The same items, which a thread prepares while the caller works: at most ``number`` wait.

    An exception of ``items`` is raised where the item would have been. The thread ends when the
    iterator is closed.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(number)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        iterator = iter(items)
        try:
            while not stopped.is_set():
                try:
                    put("item", next(iterator))
                except StopIteration:
                    return put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, daemon=True, name="read ahead")
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
