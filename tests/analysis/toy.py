"""A small dataset and detections on it."""

import numpy as np

__all__ = ["NAMES", "dataset", "detections"]

NAMES = ["cat", "dog", "cow <b>"]


def dataset(images=12, classes=NAMES):
    """Objects of three sizes on images of 400 px, one of each class; image 3 has none."""
    annotations = []
    for image in range(1, images + 1):
        for k in range(len(classes)) if image != 3 else ():
            side = (20, 50, 100)[(image + k) % 3]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 10 * k + 5,
                    "bbox": [5.0 + 130 * k, 7.0, side, side],
                    "area": side * side,
                    "iscrowd": int(image == 5 and k == 0),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 400, "height": 200}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 10 * k + 5, "name": n} for k, n in enumerate(classes)],
    }


def detections(coco, seed=0, quality=0.1):
    """Most objects, moved a little, some with another class; and some boxes on the background."""
    rng = np.random.default_rng(seed)
    ids = [c["id"] for c in coco["categories"]]
    found = []
    for a in coco["annotations"]:
        if rng.random() < 0.85:
            x, y, w, h = a["bbox"]
            dx, dy = rng.normal(0, quality * w, 2)
            category = a["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
            found.append((a["image_id"], category, [x + dx, y + dy, w, h], rng.uniform(0.3, 1)))
    for image in coco["images"]:
        box = [float(rng.uniform(0, 150)), 150.0, 30.0, 30.0]
        found.append((image["id"], int(rng.choice(ids)), box, float(rng.uniform(0, 0.6))))
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row)) for row in found]
