"""Where hotcoco's health check finds a thing in an annotation file, ours finds it too."""

import json

import pytest

from retina_plugin.doctor import quick_checks
from retina_plugin.doctor.reading import read_annotations
from retina_plugin.evaluation import coco as evaluation

hotcoco = evaluation.hotcoco
pytestmark = pytest.mark.skipif(hotcoco is None, reason="the extra 'fast' is not installed")


def add(key, **values):
    """An edit that appends a copy of the first entry with other values; None removes a key."""

    def edit(content):
        entry = content[key][0] | {"id": 1000} | values
        content[key].append({k: v for k, v in entry.items() if v is not None})

    return edit


# hotcoco's code -> (what is planted, what ours says). The codes zero_instance_category and
# low_instance_category, of the histogram of classes, belong to the checks of learning; those of
# detections (dt_*) have no ground truth to check.
PLANTED = {
    "duplicate_image_id": (add("images", id=1), "entries of images with the id of another one"),
    "duplicate_ann_id": (add("annotations", id=1), "entries of annotations with the id of anoth"),
    "duplicate_category_id": (add("categories", id=1), "entries of categories with the id of an"),
    "orphan_image_id": (add("annotations", image_id=99), "an image that the file does not have"),
    "orphan_category_id": (add("annotations", category_id=99), "none of the categories'"),
    "missing_geometry": (add("annotations", bbox=None), "annotations without a bbox"),
    "zero_dimensions": (add("images", width=0), "width or height is missing or no whole number"),
    "degenerate_bbox": (add("annotations", bbox=[1, 1, 0, 5]), "boxes without area"),
    "bbox_out_of_bounds": (add("annotations", bbox=[60, 1, 9, 5]), "that leave their image"),
    "extreme_aspect_ratio": (add("annotations", bbox=[1, 60, 60, 2]), "more than 20 times as long"),
    "zero_area": (add("annotations", area=0, bbox=[1, 1, 5, 6]), "annotations whose area is 0"),
    "near_duplicate": (
        lambda c: c["annotations"].extend(
            [
                c["annotations"][0] | {"id": 1000, "bbox": [1, 1, 40, 40]},
                c["annotations"][0] | {"id": 1001, "bbox": [1, 1, 40, 40.5]},
            ]
        ),
        "boxes with IoU above .95",
    ),
}


@pytest.mark.parametrize("code", PLANTED)
def test_finding_of_hotcoco_is_ours_too(coco, tmp_path, code):
    edit, text = PLANTED[code]
    cfg = coco(edit)
    report = hotcoco.COCO(read_annotations(tmp_path / "train.json")).healthcheck()
    codes = {finding["code"] for finding in report["errors"] + report["warnings"]}
    assert code in codes  # otherwise the planted fault is none
    assert text in "\n".join(map(str, quick_checks(cfg)))


def test_codes_of_hotcoco_are_known(tmp_path):
    """A new one would have to be looked at: this test lists what it finds in a bad file."""
    bad = {
        "images": [{"id": 1, "file_name": "a", "width": 9, "height": 0}] * 2,
        "categories": [{"id": 1, "name": "a"}] * 2 + [{"id": 2, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 1, 0, 1], "area": 0},
            {"id": 1, "image_id": 1, "category_id": 1},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [1, 1, 60, 1], "area": 0},
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 1, 60, 1], "area": 60},
        ],
    }
    report = hotcoco.COCO(json.loads(json.dumps(bad))).healthcheck()
    codes = {finding["code"] for finding in report["errors"] + report["warnings"]}
    ours = {"zero_instance_category", "low_instance_category"}
    assert codes <= PLANTED.keys() | ours, codes
