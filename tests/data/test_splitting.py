"""Training and validation sets: no image or group in both, the same seed the same split."""

import random

import pytest

from retina_plugin.data.splitting import group_by, split
from retina_plugin.errors import ConfigError


@pytest.fixture
def content():
    images = [
        {"id": i, "file_name": f"clip{i // 10}/{i // 10}_{i:03}.jpg", "video": i // 5}
        for i in range(100)
    ]
    boxes = [{"id": i + 1, "image_id": i // 2, "category_id": i % 3} for i in range(200)]
    categories = [{"id": k, "name": str(k)} for k in range(4)]
    return {"info": 1, "images": images, "annotations": boxes, "categories": categories}


def files(part):
    return {image["file_name"] for image in part["images"]}


def test_parts_make_up_the_whole(content):
    train, val = split(content, 0.3)
    assert (len(train["images"]), len(val["images"])) == (70, 30)
    assert not files(train) & files(val) and files(train) | files(val) == files(content)
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert all(box["image_id"] in ids for box in part["annotations"])
        assert len(part["annotations"]) == 2 * len(ids)
        assert part["categories"] == content["categories"] and part["info"] == 1


def test_seed_decides_and_order_does_not(content):
    val = files(split(content, seed=1)[1])
    assert val != files(split(content, seed=2)[1])
    random.Random(0).shuffle(content["images"])
    assert val == files(split(content, seed=1)[1])


@pytest.mark.parametrize(
    ("group", "key"),
    [(group_by("video"), lambda name: int(name[-7:-4]) // 5),
     (group_by("folder"), lambda name: name[:5]),
     (group_by(pattern=r"(\d)_"), lambda name: name[:5])],
    ids=["key", "folder", "pattern"],
)  # fmt: skip
def test_groups_stay_together(content, group, key):
    train, val = (set(map(key, files(part))) for part in split(content, 0.2, group=group))
    assert train and val and not train & val
    assert len(files(split(content, 0.2, group=group)[1])) == 20


def test_images_of_one_file_stay_together(content):
    for i in range(50, 100):
        content["images"][i]["file_name"] = "./" + content["images"][i - 50]["file_name"]
    train, val = split(content, 0.5)
    names = [{name.removeprefix("./") for name in files(part)} for part in (train, val)]
    assert not names[0] & names[1]


def test_large_group_leaves_both_parts_images(content):
    """Though validation becomes larger or smaller than asked for."""
    content["images"] = content["images"][:20]
    group = group_by("folder")
    for share in (0.01, 0.2, 0.99):
        assert all(part["images"] for part in split(content, share, group=group))


def test_impossible_splits_raise(content):
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split(content, share)
    with pytest.raises(ConfigError, match="has no 'vido' \\(did you mean 'video'"):
        split(content, group=group_by("vido"))
    with pytest.raises(ConfigError, match="finds nothing in the name clip"):
        split(content, group=group_by(pattern="x"))
    with pytest.raises(ConfigError, match="no regular expression"):
        group_by(pattern="(")
    content["images"] = content["images"][:1]
    with pytest.raises(ConfigError, match="needs two"):
        split(content)
