"""The divisors of the losses, in one process and in two."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from retina_plugin.errors import ConfigError
from retina_plugin.modeling import LossNormalizer

POSITIVES = torch.tensor([30, 0, 6])


def test_per_image_divides_each_image_by_its_own_positives():
    divisor = LossNormalizer("per_image")(POSITIVES)
    assert divisor.tolist() == [90.0, 3.0, 18.0]  # 3 images x max(F_n, 1)


def test_per_gpu_adds_one_for_each_image_as_detectron():
    assert LossNormalizer("per_gpu")(POSITIVES).tolist() == [39.0] * 3


def test_global_in_one_process_is_the_sum_over_the_batch():
    assert LossNormalizer("global")(POSITIVES).tolist() == [36.0] * 3
    assert LossNormalizer("global")(torch.zeros(2, dtype=torch.int64)).tolist() == [1.0] * 2


def test_ema_is_detectron2s_recurrence():
    normalizer = LossNormalizer("ema")
    expected = 100.0
    for positives in (POSITIVES, torch.zeros(2, dtype=torch.int64), torch.tensor([7])):
        expected = 0.9 * expected + 0.1 * max(int(positives.sum()), 1)
        divisor = normalizer(positives)
        assert divisor.shape == positives.shape
        torch.testing.assert_close(divisor, torch.full((len(positives),), expected))


def test_later_steps_do_not_change_earlier_divisors():
    normalizer = LossNormalizer("ema")
    first = normalizer(POSITIVES)
    kept = first.clone()
    normalizer(POSITIVES)
    assert torch.equal(first, kept)


def test_moving_average_is_a_buffer_outside_the_state_dict():
    normalizer = LossNormalizer("ema")
    assert dict(normalizer.named_buffers()).keys() == {"ema"}
    assert normalizer.state_dict() == {}


def test_unknown_mode_raises():
    with pytest.raises(
        ConfigError, match="MODEL.RETINANET.NORMALIZER.*per_image, per_gpu, global, ema"
    ):
        LossNormalizer("sum")


def _two_processes(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    positives = torch.tensor([[10, 2], [0, 0]][rank])
    for mode in ("per_image", "per_gpu", "global", "ema"):
        results[rank, mode] = LossNormalizer(mode)(positives).tolist()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_only_global_and_ema_are_shared_by_processes(tmp_path):
    """With d the mean of F_0 and F_1, the averaged loss (S_0/d + S_1/d) / 2 is that of one process:
    (S_0 + S_1) / (F_0 + F_1)."""
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(
        _two_processes, args=(f"file://{tmp_path}/store", results), nprocs=2
    )
    assert results[0, "per_image"] == [20.0, 4.0] and results[1, "per_image"] == [2.0, 2.0]
    assert results[0, "per_gpu"] == [14.0] * 2 and results[1, "per_gpu"] == [2.0] * 2
    assert results[0, "global"] == results[1, "global"] == [6.0] * 2
    torch.testing.assert_close(results[0, "ema"], [90.6] * 2)
    assert results[0, "ema"] == results[1, "ema"]
