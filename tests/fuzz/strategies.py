"""Boxes as datasets and networks give them: on a grid with many ties, anywhere, and nonsense."""

import torch
from hypothesis import strategies as st

GRID = st.integers(-8, 72)
ANYWHERE = st.floats(-100, 200, width=32)
NONSENSE = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38, 1e-30, -0.0]
)


def _tensor(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def boxes(number, coordinates=GRID | ANYWHERE):
    """(G, 4) with x1 < x2 and y1 < y2, or now and then equal."""

    def corners(values):
        x1, y1, x2, y2 = values
        return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]

    row = st.tuples(*[coordinates] * 4).map(corners)
    return st.lists(row, min_size=number[0], max_size=number[1]).map(_tensor)


def rows_of_four(number, coordinates=GRID | ANYWHERE | NONSENSE):
    """(G, 4) of any numbers: swapped corners, NaN, infinities, areas beyond float32."""
    row = st.lists(coordinates, min_size=4, max_size=4)
    return st.lists(row, min_size=number[0], max_size=number[1]).map(_tensor)


def generators():
    """A random generator: for many numbers, which hypothesis would draw one by one, slowly."""
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def random_boxes(generator, number, low, high, side=0):
    """(number, 4) of integers between ``low`` and ``high``; ``side``: the least width."""
    corners = torch.randint(low, high, (number, 2, 2), generator=generator).sort(dim=1).values
    corners[:, 1] += side
    return corners.reshape(-1, 4).float()


def pick(generator, values, *shape):
    """A tensor of ``shape`` with entries of ``values``."""
    values = torch.tensor(values)
    return values[torch.randint(len(values), shape, generator=generator)]


# Thresholds on fractions that IoUs of small integer boxes have, so that ties are common.
THRESHOLDS = st.sampled_from([0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.75, 1.0])
