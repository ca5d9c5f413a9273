"""One image of the training: where it is in the stream, and reading it with its own random numbers.

Nothing else decides what an image looks like, so any of them can be read again at any time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset

from retina_plugin.errors import ConfigError

__all__ = ["Sample", "SampleReader", "leave_signals_to_parent"]

_MAX_TRIES = 1000  # images to try in place of one for which the mapper returns None


class Sample(NamedTuple):
    """One image of the training's stream.

    Args:
        position: in the stream of all processes, from 0. It seeds the image's augmentation.
        number: of the record in the dataset.
    """

    position: int
    number: int


class SampleReader(Dataset):
    """Sample -> what the mapper makes of its record."""

    def __init__(self, dataset: Any, mapper: Callable, seed: int) -> None:
        self._dataset = dataset
        self._mapper = PicklableWrapper(mapper)  # a lambda too reaches a worker that is spawned
        self.seed = seed

    def __getitem__(self, sample: Sample | tuple[int, int]) -> Any:
        """
        Raises:
            ConfigError: the mapper returns None for a thousand images in turn.
        """
        position, index = sample
        sequence = np.random.SeedSequence([self.seed, position])
        others = np.random.default_rng(sequence.spawn(1)[0])
        with _seeded(sequence.generate_state(4)):
            for _ in range(_MAX_TRIES):
                mapped = self._mapper(self._dataset[index])
                if mapped is not None:
                    return mapped
                index = int(others.integers(len(self._dataset)))
        raise ConfigError(
            f"DATASETS.TRAIN: the mapper left out {_MAX_TRIES} images in turn (it returned None): "
            "check the dataset with `retina doctor`, or the mapper"
        )


@contextlib.contextmanager
def _seeded(words: np.ndarray) -> Iterator[None]:
    """Seed the generators of python, numpy and torch, and put them back.

    Args:
        words: four of 32 bits.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(words.tobytes())
        np.random.seed(words)
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def leave_signals_to_parent(worker: int) -> None:
    """Signals that ask a training to stop reach its workers too, from a terminal or from SLURM.

    The training then finishes its iteration, for which it needs the workers, and ends them itself.
    A SIGTERM of the training ends a worker: at its exit Python sends one, and waits for the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Thread: end this process when its parent sends SIGTERM. A handler cannot tell who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
