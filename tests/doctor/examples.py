"""Boxes and configs for the tests of the doctor."""

import numpy as np
from detectron2.structures import BoxMode

from retina_plugin.engine import setup_cfg


def config(*opts):
    """The paper's anchors (32 px and more on strides 8 to 128) on images of 160 px."""
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(160,)", "MODEL.DEVICE", "cpu"]
    return setup_cfg("retina_R50_800.yaml", [*sizes, *map(str, opts)])


def record(boxes, *, name="a.jpg", shape=(160, 160), classes=None, **others):
    """A record of Detectron2 with boxes XYXY."""
    classes = [0] * len(boxes) if classes is None else classes
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, **others}
        for box, label in zip(boxes, classes)
    ]
    height, width = shape
    return {"file_name": name, "height": height, "width": width, "annotations": annotations}


def random_records(rng, width, height, *, images=40, boxes=5, shape=(160, 160), num_classes=3):
    """Boxes whose sides are uniform in the ranges ``width`` and ``height``, in pixels."""
    records = []
    for i in range(images):
        sides = np.stack([rng.uniform(*width, boxes), rng.uniform(*height, boxes)], axis=1)
        corners = rng.uniform(size=(boxes, 2)) * (np.array(shape[::-1]) - sides)
        of_boxes = np.concatenate([corners, corners + sides], axis=1).tolist()
        classes = rng.integers(num_classes, size=boxes).tolist()
        records.append(record(of_boxes, name=f"{i}.jpg", shape=shape, classes=classes))
    return records
