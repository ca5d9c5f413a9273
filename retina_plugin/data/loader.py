"""The training loader, which knows its position in the data, so that a resumed run goes on there.

Detectron2's loader batches decoded images, so what it has handed out can only be found by decoding
it again. Here indices are batched, and the images of a batch are read afterwards.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.utils import comm
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .samples import Sample, SampleReader, leave_signals_to_parent

__all__ = ["ResumableLoader", "build_train_loader"]

logger = logging.getLogger("retina_plugin")

_TURNED = range(5, 9)  # values of EXIF's orientation that swap width and height


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict[str, Any]], Any]) -> Any:
    """Detectron2's training loader, as a :class:`ResumableLoader`.

    ``DATALOADER`` is read as by Detectron2. An ``IterableDataset`` has no positions, so it gets
    Detectron2's loader.

    Args:
        mapper: record -> what the model gets. None for a record that should be left out.
    """
    parts = _train_loader_from_config(cfg, mapper=mapper)
    if isinstance(parts["dataset"], IterableDataset):
        return build_detection_train_loader(**parts)
    return ResumableLoader(
        parts["dataset"],
        mapper,
        parts["sampler"],
        batch_size=parts["total_batch_size"] // comm.get_world_size(),
        aspect_ratio_grouping=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
    )


class ResumableLoader:
    """This process's batches, with a position that can be saved and returned to.

    Images and their order are those of Detectron2's loader without workers, and do not depend on
    the number of workers. Each image's augmentation is seeded by ``seed`` and the image's position
    in the stream, so a batch does not depend on what ran before it.

    Peer: ``detectron2.data.build_detection_train_loader``.

        loader = build_train_loader(cfg, mapper)
        batches = iter(loader)
        batch = next(batches)
        state = loader.state_dict()  # of the next batch, whatever the workers have read ahead
        again = loader.read(loader.last_samples)  # equal to batch

    Args:
        dataset: the records, or a map-style dataset of them.
        mapper: record -> what the model gets, or None: another image is taken in its place. Its
            random numbers must come from ``random``, ``numpy.random`` or ``torch``, as those of
            Detectron2's augmentations do.
        sampler: one of Detectron2's training samplers. Of another one, this process's iterator is
            used, which must give the same indices each time if a resumed run should be exact.
        batch_size: images of this process.
        aspect_ratio_grouping: give only wide images, or only others, in a batch.
        num_workers: processes that read images; 0: this one does.
        seed: of the augmentation, the same in all processes. None: drawn from numpy's generator.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]] | Dataset,
        mapper: Callable[[dict[str, Any]], Any],
        sampler: Any,
        *,
        batch_size: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self.dataset: Any = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.aspect_ratio_grouping = aspect_ratio_grouping
        self.num_workers = num_workers
        seed = comm.shared_random_seed() if seed is None else seed
        self._reader = SampleReader(self.dataset, mapper, seed)
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()
        self._next = _Place(0, ())
        self.last_samples: list[Sample] = []

    def __iter__(self) -> Iterator[list[Any]]:
        """The batches from the present position on."""
        places: deque[tuple[list[Sample], _Place]] = deque()  # of what the workers read ahead
        loader = DataLoader(
            self._reader,
            batch_sampler=self._batches(self._next, places),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            worker_init_fn=leave_signals_to_parent,
            # Its own, because it would draw from the generator of the training.
            generator=torch.Generator().manual_seed(self._reader.seed),
        )
        for batch in loader:
            self.last_samples, self._next = places.popleft()
            yield batch

    def _batches(
        self, start: _Place, places: deque[tuple[list[Sample], _Place]]
    ) -> Iterator[list[Sample]]:
        """The samples of each batch; ``places`` gets them too, and where the next batch starts."""
        groups: tuple[list[Sample], list[Sample]] = ([], [])
        waiting, position = deque(start.waiting), start.position
        stream = self._stream(position)
        while True:
            if waiting:
                sample = waiting.popleft()
            else:
                try:
                    sample = next(stream)
                except StopIteration:  # of a sampler that ends; Detectron2's do not
                    return
                position += self._world_size
            group = groups[self.aspect_ratio_grouping and not self._is_wide(sample.number)]
            group.append(sample)
            if len(group) == self.batch_size:
                batch = group[:]
                group.clear()
                left = tuple(sorted([*groups[0], *groups[1], *waiting]))
                places.append((batch, _Place(position, left)))
                yield batch

    def _stream(self, position: int) -> Iterator[Sample]:
        """This process's samples. The first one is in the round of all processes at ``position``.

        A round is one image for each process.
        """
        if hasattr(self.sampler, "_infinite_indices"):  # Detectron2's, before it is split
            indices = itertools.islice(
                self.sampler._infinite_indices(), position + self._rank, None, self._world_size
            )
        else:
            indices = itertools.islice(self.sampler, position // self._world_size, None)
        positions = itertools.count(position + self._rank, self._world_size)
        return (Sample(p, int(i)) for p, i in zip(positions, indices))

    def _is_wide(self, index: int) -> bool:
        record = self.dataset[index]
        if "width" in record and "height" in record:
            return record["width"] > record["height"]
        try:  # Detectron2 would take the size of the image once it is read
            with Image.open(record["file_name"]) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
                width, height = reversed(image.size) if turned else image.size
        except (KeyError, OSError):
            return False  # the mapper finds out, and says so
        return width > height

    def read(self, samples: Iterable[Sample | tuple[int, int]]) -> list[Any]:
        """A batch of these samples, in this process: the same as when the loader gave it."""
        return [self._reader[position, index] for position, index in samples]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch of this process starts, in plain Python values."""
        return {
            "position": self._next.position,
            "waiting": [tuple(sample) for sample in self._next.waiting],
            "world_size": self._world_size,
            "length": len(self.dataset),
            "sampler": type(self.sampler).__name__,
            "sampler_seeds": {
                name: getattr(self.sampler, name)
                for name in ("_seed", "_seed_subset")
                if hasattr(self.sampler, name)
            },
            "seed": self._reader.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position: the next iterator starts there.

        With another number of processes, pass the state of the process that is furthest. All
        processes go on behind it, and images that waited for their batch are left out. With another
        dataset or sampler, the order begins anew. Both give a warning.
        """
        # Kept: the order and the augmentation of the interrupted run, which may have had SEED -1.
        self._reader.seed = state["seed"]
        seeds = state["sampler_seeds"]
        for name, seed in seeds.items():
            setattr(self.sampler, name, seed)
        if "_seed_subset" in seeds and hasattr(self.sampler, "_indexes_subset"):
            # As Detectron2's RandomSubsetTrainingSampler draws its subset.
            order = torch.Generator().manual_seed(seeds["_seed_subset"])
            size, subset = self.sampler._size, self.sampler._size_subset
            self.sampler._indexes_subset = torch.randperm(size, generator=order)[:subset]
        length, name = len(self.dataset), type(self.sampler).__name__
        if (state["length"], state["sampler"]) != (length, name):
            logger.warning(
                "The training set has %s images and %s, in the checkpoint it had %s and %s: "
                "the order of the images begins anew",
                *(length, name, state["length"], state["sampler"]),
            )
            self._next = _Place(0, ())
        elif state["world_size"] != self._world_size:
            logger.warning(
                "%s processes, in the checkpoint there were %s: the order of the images goes on "
                "behind image %s of the training, but the batches are others",
                *(self._world_size, state["world_size"], state["position"]),
            )
            # Rounds have another size: the first that begins behind what was seen.
            rounds = -(-state["position"] // self._world_size)
            self._next = _Place(rounds * self._world_size, ())
        else:
            waiting = tuple(Sample(*sample) for sample in state["waiting"])
            self._next = _Place(state["position"], waiting)


class _Place(NamedTuple):
    """Where a batch starts."""

    position: int  # of the next round of the stream; a multiple of the number of processes
    waiting: tuple[Sample, ...]  # taken from the stream, but their group does not fill a batch yet


def _as_list(batch: list[Any]) -> list[Any]:
    """No collation: a batch is a list of records."""
    return batch
