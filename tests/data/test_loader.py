"""The training loader: Detectron2's order, and a position that can be returned to."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch.utils.data import IterableDataset, SequentialSampler

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.data.loader import ResumableLoader, build_train_loader
from retina_plugin.errors import ConfigError

SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)


def records(num=11):
    """Some wide, some not."""
    return [
        {"image_id": i, "width": 20 if i % 3 else 10, "height": 15, "annotations": []}
        for i in range(num)
    ]


def draw(record):
    """A mapper that draws from each generator that augmentations use."""
    numbers = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "drawn": numbers}


def loader_of(num=11, mapper=draw, sampler=None, seed=3, **options):
    sampler = sampler or TrainingSampler(num, seed=5)
    return ResumableLoader(
        records(num), mapper, sampler, **{"batch_size": 2, "seed": seed, **options}
    )


def take(loader, count):
    """The first batches, as (image id, drawn numbers)."""
    batches = list(itertools.islice(loader, count))
    return [[(record["image_id"], record.get("drawn")) for record in batch] for batch in batches]


def ids(batches):
    return [[image for image, _ in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_order_is_detectron2s(tiny_cfg, name, grouping):
    """With 0 workers and the same seed: the same images in the same batches."""
    tiny_cfg.DATALOADER.SAMPLER_TRAIN = name
    tiny_cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    tiny_cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.6
    tiny_cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    tiny_cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("digits_scenes_train", 1.5)]
    tiny_cfg.SOLVER.IMS_PER_BATCH = 3
    found = []
    for build in (build_train_loader, build_detection_train_loader):
        seed_all_rng(1)
        loader = build(tiny_cfg, mapper=DATASET_MAPPER_REGISTRY.build(tiny_cfg, True))
        found.append([[r["image_id"] for r in b] for b in itertools.islice(loader, 12)])
    assert found[0] == found[1] and len(set(itertools.chain(*found[0]))) > 3


def test_order_of_mixed_shapes_is_detectron2s():
    """Wide images and others are batched apart."""
    shapes = {r["image_id"]: r["width"] > r["height"] for r in records()}
    expected = build_detection_train_loader(
        records(),
        mapper=lambda record: record,
        sampler=TrainingSampler(11, seed=5),
        total_batch_size=2,
        aspect_ratio_grouping=True,
    )
    expected = [[r["image_id"] for r in b] for b in itertools.islice(expected, 30)]
    assert ids(take(loader_of(), 30)) == expected
    assert all(len({shapes[i] for i in batch}) == 1 for batch in expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
def test_resumed_loader_gives_the_rest(grouping, workers):
    """To the bit, at each position, whatever the workers have read ahead."""
    options = {"aspect_ratio_grouping": grouping, "num_workers": workers}
    whole = take(loader_of(**options), 12)
    for done in (0, 1, 5):
        first = loader_of(**options)
        assert take(first, done) == whole[:done]
        # Other seeds: those of the checkpoint count.
        second = loader_of(sampler=TrainingSampler(11, seed=99), seed=98, **options)
        second.load_state_dict(first.state_dict())
        assert take(second, 12 - done) == whole[done:]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resumed_loader_does_not_read_what_was_seen(tiny_cfg, sampler):
    """With each sampler of Detectron2."""
    tiny_cfg.DATALOADER.SAMPLER_TRAIN = sampler
    tiny_cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    tiny_cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("digits_scenes_train", 1.5)]
    tiny_cfg.SEED = 7
    read = []

    def mapper(record):
        read.append(record["image_id"])
        return draw(record)

    whole = build_train_loader(tiny_cfg, mapper)
    batches = iter(whole)
    for _ in range(9):
        next(batches)
    state, expected = whole.state_dict(), [next(batches) for _ in range(9)]
    read.clear()
    rest = build_train_loader(tiny_cfg, mapper)  # numpy's generator has moved on: another order
    rest.load_state_dict(state)
    found = list(itertools.islice(rest, 9))
    assert [[r["drawn"] for r in b] for b in found] == [[r["drawn"] for r in b] for b in expected]
    assert len(read) == 18


def test_own_sampler_goes_on_where_it_was():
    """Its iterator is this process's."""
    first = loader_of(sampler=SequentialSampler(range(11)), aspect_ratio_grouping=False)
    assert ids(take(first, 2)) == [[0, 1], [2, 3]]
    second = loader_of(sampler=SequentialSampler(range(11)), aspect_ratio_grouping=False)
    second.load_state_dict(first.state_dict())
    assert ids(take(second, 9)) == [[4, 5], [6, 7], [8, 9]]  # it ends, without a part of a batch


def test_batch_does_not_depend_on_workers():
    """Nor on the generators of the process, which it leaves as they were."""
    expected = take(loader_of(), 6)
    seed_all_rng(4)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert take(loader_of(), 6) == expected
    assert take(loader_of(num_workers=2), 6) == expected
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    drawn = [numbers for batch in expected for _, numbers in batch]
    assert len(set(drawn)) == len(drawn)
    assert take(loader_of(seed=4), 6) != expected


def test_generators_are_put_back_after_an_error():
    """Of the mapper."""

    def broken(record):
        np.random.rand()
        raise ZeroDivisionError

    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
    with pytest.raises(ZeroDivisionError):
        take(loader_of(mapper=broken), 1)
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_read_gives_a_batch_again(workers):
    """Whatever was read between."""
    loader = loader_of(num_workers=workers)
    kept = []
    for batch in itertools.islice(loader, 4):
        kept.append((loader.last_samples, batch))
    for samples, batch in reversed(kept):
        assert loader.read([tuple(s) for s in samples]) == batch


def test_left_out_image_is_replaced():
    """By one that only depends on the seed and the position."""

    def odd_only(record):
        return draw(record) if record["image_id"] % 2 else None

    expected = take(loader_of(mapper=odd_only), 20)
    assert all(image % 2 for image in itertools.chain(*ids(expected)))
    assert len(set(itertools.chain(*ids(expected)))) == 5
    first, second = loader_of(mapper=odd_only), loader_of(mapper=odd_only)
    take(first, 7)
    second.load_state_dict(first.state_dict())
    assert take(second, 13) == expected[7:]


@pytest.mark.parametrize("workers", [0, 1])
def test_mapper_that_leaves_out_every_image_raises(workers):
    with pytest.raises(ConfigError, match="the mapper left out 1000 images in turn"):
        take(loader_of(mapper=lambda record: None, num_workers=workers), 1)


def with_processes(rank, world_size, **options):
    loader = loader_of(**options)
    loader._rank, loader._world_size = rank, world_size
    return loader


def test_processes_share_the_stream():
    """Each position belongs to one of them; augmentation depends on the position alone."""
    alone = loader_of(aspect_ratio_grouping=False, batch_size=4)
    for batch in itertools.islice(alone, 5):
        parts = [with_processes(r, 2, aspect_ratio_grouping=False) for r in (0, 1)]
        for rank, part in enumerate(parts):
            samples = alone.last_samples[rank::2]
            assert part.read(samples) == batch[rank::2]
    both = [
        list(itertools.chain(*take(with_processes(r, 2, aspect_ratio_grouping=False), 6)))
        for r in (0, 1)
    ]
    merged = [sample for pair in zip(*both) for sample in pair]
    expected = take(loader_of(aspect_ratio_grouping=False), 12)
    assert merged == list(itertools.chain(*expected))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_other_number_of_processes_goes_on_behind_what_was_seen(log, before, after):
    """With a warning. No image of the rest is left out, and none is seen twice."""
    options = {"aspect_ratio_grouping": False, "batch_size": 3}
    states = []
    for rank in range(before):
        loader = with_processes(rank, before, **options)
        take(loader, 4)
        states.append(loader.state_dict())
    seen = 4 * 3 * before
    positions = []
    for rank in range(after):
        loader = with_processes(rank, after, **options)
        loader.load_state_dict(max(states, key=lambda state: state["position"]))
        for _ in itertools.islice(loader, 4):
            positions += [sample.position for sample in loader.last_samples]
    assert sorted(positions) == list(range(seen, seen + 4 * 3 * after))
    assert f"in the checkpoint there were {before}" in log.text


def test_other_dataset_begins_anew(log):
    first, second = loader_of(11), loader_of(12, sampler=TrainingSampler(12, seed=5))
    take(first, 3)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == take(loader_of(12, sampler=TrainingSampler(12, seed=5)), 5)
    assert "The training set has 12 images and TrainingSampler, in the checkpoint it had 11" in (
        log.text
    )


def test_other_sampler_begins_anew(log):
    first = loader_of()
    take(first, 3)
    second = loader_of(sampler=RepeatFactorTrainingSampler(torch.ones(11), seed=5))
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["position"] == 0
    assert "begins anew" in log.text


@pytest.mark.parametrize("size", [1, 3])
def test_other_batch_size_keeps_the_waiting_images(size):
    """Images of a group that did not fill a batch come next."""
    first = loader_of(batch_size=4)
    batches = iter(first)
    while len(first.state_dict()["waiting"]) < 2:
        next(batches)
    state = first.state_dict()
    second = loader_of(batch_size=size)
    second.load_state_dict(state)
    positions = []
    for _ in itertools.islice(second, 12):
        positions += [sample.position for sample in second.last_samples]
        third = loader_of(batch_size=size)
        third.load_state_dict(second.state_dict())
        following = positions + [p for p, _ in third.state_dict()["waiting"]]
        assert sorted(following)[-1] < third.state_dict()["position"]
        assert len(set(following)) == len(following)
    waiting = [position for position, _ in state["waiting"]]
    assert set(waiting) <= set(positions)


def test_subset_is_that_of_the_checkpoint():
    """RandomSubsetTrainingSampler draws it when it is built."""
    first = loader_of(sampler=RandomSubsetTrainingSampler(11, 0.5, seed_shuffle=1, seed_subset=2))
    second = loader_of(sampler=RandomSubsetTrainingSampler(11, 0.5, seed_shuffle=3, seed_subset=4))
    second.load_state_dict(first.state_dict())
    assert take(second, 8) == take(first, 8)


def test_group_of_an_image_without_a_recorded_size(tmp_path):
    """Is that of the file, as it will be read: EXIF may turn it."""
    found = []
    for number, (size, orientation) in enumerate([((20, 10), 1), ((20, 10), 6), ((10, 20), 8)]):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(tmp_path / f"{number}.jpg", exif=exif)
        found.append({"file_name": str(tmp_path / f"{number}.jpg")})
    loader = ResumableLoader(found, draw, TrainingSampler(3, seed=0), batch_size=1)
    assert [loader._is_wide(i) for i in range(3)] == [True, False, True]


def test_iterable_dataset_gets_detectron2s_loader(tiny_cfg, monkeypatch):
    """It has no positions."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(records(4))

    monkeypatch.setattr(
        "detectron2.data.build.get_detection_dataset_dicts", lambda *a, **k: Stream()
    )
    tiny_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_train_loader(tiny_cfg, lambda record: record)
    assert not isinstance(loader, ResumableLoader)
    assert [r["image_id"] for batch in loader for r in batch] == [0, 1, 2, 3]


def test_state_is_plain(tiny_cfg):
    """Numbers, names, lists and tuples, which every reader of checkpoints admits."""

    def check(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, (list, tuple)):
            assert type(value) in (list, tuple)
            for entry in value:
                check(entry)
        else:
            assert type(value) in (int, str)

    loader = build_train_loader(tiny_cfg, draw)
    take(loader, 3)
    check(loader.state_dict())
