"""torchvision's resize, against ``GeneralizedRCNNTransform``."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.data.resizing import TorchvisionResizeShortestEdge, choose_resize

SHAPES = [(300, 450), (451, 300), (333, 333), (100, 977), (479, 640), (1, 50), (160, 100)]


def image_of(shape, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (*shape, channels), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(160, 266), (320, 533), (800, 1333)])
def test_size_and_numbers_are_torchvisions_to_the_bit(shape, sizes):
    image = image_of(shape)
    transform = GeneralizedRCNNTransform(*sizes, [0.0] * 3, [1.0] * 3)
    expected, _ = transform.eval().resize(torch.from_numpy(image).permute(2, 0, 1).float())
    resize = TorchvisionResizeShortestEdge([sizes[0]], sizes[1], "choice")
    got = resize.get_transform(image).apply_image(image)
    assert got.dtype == np.float32
    assert torch.equal(torch.from_numpy(got).permute(2, 0, 1), expected)


def test_a_side_is_at_least_one_pixel():
    """Where torchvision stops with an error."""
    transform = TorchvisionResizeShortestEdge([160], 266, "choice").get_transform(
        image_of((1, 1000))
    )
    assert (transform.new_h, transform.new_w) == (1, 266)


def test_boxes_and_segmentation_follow_the_image():
    transform = TorchvisionResizeShortestEdge([160], 266, "choice").get_transform(
        image_of((300, 451))
    )
    assert (transform.new_h, transform.new_w) == (160, 240)
    box = transform.apply_box(np.array([[0.0, 0, 451, 300]]))
    np.testing.assert_allclose(box, [[0, 0, 240, 160]], rtol=1e-12)
    labels = (image_of((300, 451), 1)[:, :, 0] > 127).astype(np.uint8) * 9
    resized = transform.apply_segmentation(labels)
    assert resized.shape == (160, 240) and set(np.unique(resized)) == {0, 9}


@pytest.mark.parametrize("style, sizes", [("choice", [64, 96, 128]), ("range", [64, 128])])
def test_short_edges_are_drawn_as_in_detectron2(style, sizes):
    image, seen = image_of((200, 200)), set()
    for seed in range(20):
        drawn = []
        for kind in (T.ResizeShortestEdge, TorchvisionResizeShortestEdge):
            np.random.seed(seed)
            drawn.append(kind(sizes, 1000, style).get_transform(image).new_h)
        assert drawn[0] == drawn[1]
        seen.add(drawn[0])
    assert len(seen) > 2


def test_a_short_edge_of_0_keeps_the_size():
    transform = TorchvisionResizeShortestEdge([0], 1000, "choice").get_transform(image_of((20, 30)))
    assert isinstance(transform, T.NoOpTransform)


def test_other_augmentations_stay():
    flip, resize = T.RandomFlip(), T.ResizeShortestEdge([64, 128], 500, "range")
    assert choose_resize([resize, flip], "detectron2") == [resize, flip]
    ours, same = choose_resize([resize, flip], "torchvision")
    assert same is flip and type(ours) is TorchvisionResizeShortestEdge
    assert (ours.short_edge_length, ours.max_size, ours.is_range) == ([64, 128], 500, True)


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
@pytest.mark.parametrize("image_format, channels", [("RGB", 3), ("L", 1)])
def test_both_mappers_resize_like_torchvision(tiny_cfg, tmp_path, name, image_format, channels):
    tiny_cfg.INPUT.RESIZE, tiny_cfg.INPUT.FORMAT = "torchvision", image_format
    tiny_cfg.INPUT.MAPPER = name
    image = image_of((90, 130), channels)
    file_name = str(tmp_path / "image.png")
    Image.fromarray(image.squeeze()).save(file_name)
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, False)
    record = mapper({"file_name": file_name, "height": 90, "width": 130})
    transform = GeneralizedRCNNTransform(64, tiny_cfg.INPUT.MAX_SIZE_TEST, [0.0], [1.0])
    expected, _ = transform.eval().resize(torch.from_numpy(image).permute(2, 0, 1).float())
    assert torch.equal(record["image"], expected)
