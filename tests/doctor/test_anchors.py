"""The best IoU of every box: exact values, and equality with all anchors compared one by one."""

import numpy as np
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import Boxes, RotatedBoxes, pairwise_iou
from torchvision.ops import box_iou

from retina_plugin.doctor.anchors import AnchorGrid
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import AnchorMatcher, build_retina_fpn_backbone
from tests.doctor.examples import config


@pytest.fixture(scope="module")
def grid():
    return AnchorGrid.from_cfg(config())


def maps(grid, shape, count):
    """(count, L, 2): the same image for every box."""
    return np.repeat(grid.map_shapes(np.array([shape])), count, axis=0)


def reference_anchors(cfg, map_shapes_L2, strides=(8, 16, 32, 64, 128)):
    """Per level all anchors in float64, from the definition of ``MODEL.ANCHOR_GENERATOR``."""
    generator = cfg.MODEL.ANCHOR_GENERATOR
    sizes = generator.SIZES * (len(strides) if len(generator.SIZES) == 1 else 1)
    for level_sizes, stride, (rows, columns) in zip(sizes, strides, map_shapes_L2):
        shapes = [(s / r**0.5, s * r**0.5) for s in level_sizes for r in generator.ASPECT_RATIOS[0]]
        half = torch.tensor(shapes, dtype=torch.float64) / 2
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (torch.stack([x, y], dim=-1).flatten(0, 1)[:, None] + generator.OFFSET) * stride
        yield torch.cat([centre - half, centre + half], dim=-1).flatten(0, 1)


def brute_force(levels, boxes_G4):
    """The highest of the IoUs with all anchors, in float64."""
    boxes = torch.from_numpy(boxes_G4)
    return torch.stack([box_iou(boxes, a.double()).amax(dim=1) for a in levels]).amax(dim=0).numpy()


def random_boxes(rng, shape, count=100):
    """Boxes of 1 px to twice the image, some of which leave it."""
    sides = np.exp(rng.uniform(0, np.log(2 * max(shape)), (count, 2)))
    centres = rng.uniform(-0.2, 1.2, (count, 2)) * shape[::-1]
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)


@pytest.mark.parametrize("shape", [(160, 160), (333, 500), (30, 400), (8, 8), (800, 1333)])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_iou_equals_brute_force(shape, offset):
    cfg = config("MODEL.ANCHOR_GENERATOR.OFFSET", offset)
    grid = AnchorGrid.from_cfg(cfg)
    boxes = random_boxes(np.random.default_rng(0), shape, 20 if max(shape) > 1000 else 100)
    best = grid.best_iou(boxes, maps(grid, shape, len(boxes)))
    map_shapes = grid.map_shapes(np.array([shape]))[0]
    expected = brute_force(reference_anchors(cfg, map_shapes), boxes)
    np.testing.assert_allclose(best, expected, rtol=0, atol=1e-6)
    # and with the model's own anchors and IoUs, which are float32
    anchors = torch.cat(grid.anchors(map_shapes))
    of_model = pairwise_iou(Boxes(torch.from_numpy(boxes)), Boxes(anchors)).amax(dim=1)
    np.testing.assert_allclose(best, of_model, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("levels", "strides"), [(("p3",), (8,)), (("p4", "p5"), (16, 32))])
def test_best_iou_on_other_levels_sizes_and_ratios(levels, strides):
    options = {
        "MODEL.RETINANET.IN_FEATURES": list(levels),
        "MODEL.ANCHOR_GENERATOR.SIZES": [[5.0, 90.0]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.1, 1.0, 3.0, 9.0]],
    }
    cfg = config(*[x for pair in options.items() for x in pair])
    grid = AnchorGrid.from_cfg(cfg)
    assert grid.names == levels and grid.num_cell_anchors == 8
    boxes = random_boxes(np.random.default_rng(1), (200, 300))
    best = grid.best_iou(boxes, maps(grid, (200, 300), len(boxes)))
    anchors = reference_anchors(cfg, grid.map_shapes(np.array([[200, 300]]))[0], strides)
    np.testing.assert_allclose(best, brute_force(anchors, boxes), rtol=0, atol=1e-6)


class ShiftedAnchors(torch.nn.Module):
    """A generator of one's own: anchors with different centres, other steps in x and y."""

    def forward(self, features):
        cells = torch.tensor([[0.0, 0, 10, 30], [-5, 3, 40, 20], [7, 7, 9, 9]])
        levels = []
        for i, feature in enumerate(features):
            rows, columns = feature.shape[-2:]
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            shift = torch.stack([x * (6 + i), y * (11 + i)] * 2, dim=-1).flatten(0, 1)
            levels.append(Boxes((shift[:, None] + cells).flatten(0, 1)))
        return levels


def test_best_iou_of_a_generator_of_ones_own():
    grid = AnchorGrid.from_generator(ShiftedAnchors(), ("a", "b"), (8, 16), 0)
    assert grid.steps == ((6, 11), (7, 12))
    boxes = random_boxes(np.random.default_rng(2), (120, 90))
    best = grid.best_iou(boxes, maps(grid, (120, 90), len(boxes)))
    anchors = grid.anchors(grid.map_shapes(np.array([[120, 90]]))[0])
    np.testing.assert_allclose(best, brute_force(anchors, boxes), rtol=0, atol=1e-6)


class IrregularAnchors(torch.nn.Module):
    def forward(self, features):
        return [Boxes(torch.rand(f.shape[-1] * f.shape[-2], 4)) for f in features]


class RotatedAnchors(torch.nn.Module):
    def forward(self, features):
        return [RotatedBoxes(torch.rand(f.shape[-1] * f.shape[-2], 5)) for f in features]


@pytest.mark.parametrize("generator", [IrregularAnchors, RotatedAnchors])
def test_anchors_that_are_no_grid_are_refused(generator):
    with pytest.raises(ConfigError, match=f"NAME {generator.__name__}: .* cannot be measured"):
        AnchorGrid.from_generator(generator(), ("p3",), (8,), 0)


@pytest.mark.parametrize(
    ("box", "iou"),
    [
        ((-16, -16, 16, 16), 1),  # an anchor of p3
        ((16, 16, 48, 48), 1),
        ((12, 16, 44, 48), 28 / 36),  # half a stride beside it: 28 of 32 px overlap
        ((12, 12, 44, 44), 32**2 / 40.31747359663594**2),  # the next larger anchor holds it
        ((24, 24, 40, 40), 0.25),  # half as large
        ((32, 32, 36, 36), 16 / 1024),
        ((5000, 5000, 5032, 5032), 0),  # far outside of the grid
    ],
)
def test_exact_values(grid, box, iou):
    best = grid.best_iou(np.array([box], dtype=float), maps(grid, (160, 160), 1))
    assert best == pytest.approx([iou], abs=1e-6)


def test_model_makes_an_anchor_positive_where_the_best_iou_says_so(grid):
    rng, shape = np.random.default_rng(3), (160, 240)
    boxes = random_boxes(rng, shape, 200)
    best = grid.best_iou(boxes, maps(grid, shape, len(boxes)))
    anchors = torch.cat(grid.anchors(grid.map_shapes(np.array([shape]))[0]))
    matcher = AnchorMatcher((0.4, 0.5), (0, -1, 1), "never")
    for box, iou in zip(boxes, best):
        if abs(iou - 0.5) > 1e-4:  # the matcher computes in float32
            label = matcher(torch.from_numpy(box[None]).float(), anchors).label
            assert bool((label == 0).any()) == (iou >= 0.5)


def test_feature_maps_are_those_of_the_model(tiny_cfg):
    grid = AnchorGrid.from_cfg(tiny_cfg)
    model = build_model(tiny_cfg).eval()
    shapes = [(64, 64), (65, 97), (33, 200)]
    for shape, map_shape in zip(shapes, grid.map_shapes(np.array(shapes))):
        images = model.preprocess_image([{"image": torch.zeros(3, *shape)}])
        with torch.no_grad():
            features = model.backbone(images.tensor)
        features = [features[name] for name in grid.names]
        assert [list(f.shape[-2:]) for f in features] == map_shape.tolist()
        model_anchors = torch.cat([a.tensor for a in model.anchor_generator(features)])
        assert torch.equal(torch.cat(grid.anchors(map_shape)), model_anchors)


def test_backbone_whose_constructor_reads_numbers():
    """As Swin's does, for its drop path rates: not possible without memory."""

    @BACKBONE_REGISTRY.register()
    def build_counting_backbone(cfg, input_shape):
        assert torch.linspace(0, 1, 3)[1].item() == 0.5
        return build_retina_fpn_backbone(cfg, input_shape)

    grid = AnchorGrid.from_cfg(config("MODEL.BACKBONE.NAME", "build_counting_backbone"))
    assert grid.strides == (8, 16, 32, 64, 128)


def test_padding_to_a_square():
    grid = AnchorGrid.from_generator(ShiftedAnchors(), ("p3",), (8,), 0, square=100)
    assert grid.map_shapes(np.array([[40, 90]])).tolist() == [[[13, 13]]]


def test_unknown_level_raises():
    with pytest.raises(ConfigError, match="IN_FEATURES: the backbone has no feature 'p9'; known:"):
        AnchorGrid.from_cfg(config("MODEL.RETINANET.IN_FEATURES", ["p3", "p9"]))
