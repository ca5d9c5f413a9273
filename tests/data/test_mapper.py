"""FastMapper against Detectron2's mapper: the same records from the same seed."""

import copy
import io
import warnings

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper as Detectron2DatasetMapper
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import DataLoader

from retina_plugin.data import DATASET_MAPPER_REGISTRY, DatasetMapper, FastMapper
from retina_plugin.data.images import BadImageError, image_to_tensor, read_image
from retina_plugin.data.resizing import FastResize
from retina_plugin.errors import ConfigError

H, W = 120, 161  # an odd width cuts a chroma block


def photo(height=H, width=W, seed=0):
    """(height, width, 3) uint8 with edges, gradients and noise, like a photo."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells, size in ((4, 90), (16, 50), (60, 25)):
        image += size * cv2.resize(rng.random((cells, cells, 3), np.float32), (width, height))
    return (image + rng.normal(0, 4, image.shape) + 40).clip(0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    """An RGB array or a Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """write(bytes) -> path of a file with them."""

    def save(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        return str(path)

    return save


def annotations(num=6, seed=0, crowd=()):
    """COCO annotations; the first box extends beyond the image, the last has no width."""
    rng = np.random.default_rng(seed)
    made = [
        {
            "bbox": [*(rng.random(2) * 80).round(2).tolist(), *(rng.random(2) * 60 + 1).tolist()],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": i % 3,
            "iscrowd": int(i in crowd),
            "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
        }
        for i in range(num)
    ]
    if num:
        made[0]["bbox"] = [-7.5, 100.25, 90, 30.5]
        made[-1]["bbox"][2] = 0.0
    return made


@pytest.fixture
def record(write):
    """A Detectron2 record with a JPEG."""
    path = write(encode(photo(), quality=90))
    size = {"height": H, "width": W}
    return {"file_name": path, **size, "image_id": 7, "annotations": annotations(), "extra": [1, 2]}


def both(cfg, record, seed, is_train=True):
    """The record of each mapper from the same seed, after the same number of random draws."""
    outputs, states = [], []
    for name in ("FastMapper", "DatasetMapper"):
        cfg.INPUT.MAPPER = name
        mapper = DATASET_MAPPER_REGISTRY.build(cfg, is_train)
        np.random.seed(seed)
        outputs.append(mapper(record))
        states.append(np.random.get_state()[1:3])
    assert np.array_equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    return outputs


def assert_same(fast, slow, share=1e-3):
    """Records are equal, but at most a ``share`` of pixel values may differ, by 1."""
    assert fast.keys() == slow.keys()
    image, expected = fast["image"], slow["image"]
    assert image.dtype == expected.dtype and image.shape == expected.shape
    assert image.is_contiguous()
    off = (image.int() - expected.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= share
    if "instances" in slow:
        ours, theirs = fast["instances"], slow["instances"]
        assert ours.image_size == theirs.image_size
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert ours.gt_boxes.tensor.dtype == theirs.gt_boxes.tensor.dtype
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)  # to the bit
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
    for key in set(slow) - {"image", "instances"}:
        assert fast[key] == slow[key]


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
@pytest.mark.parametrize("sampling", ["choice", "range"])
@pytest.mark.parametrize("crop", [None, "relative_range", "absolute"])
def test_same_records_as_detectron2(tiny_cfg, record, image_format, flip, sampling, crop):
    """Sizes, crops, flips and boxes to the bit; pixels differ by at most 1."""
    tiny_cfg.INPUT.FORMAT, tiny_cfg.INPUT.RANDOM_FLIP = image_format, flip
    tiny_cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sampling
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (97, 203) if sampling == "range" else (97, 151, 203)
    tiny_cfg.INPUT.MAX_SIZE_TRAIN = 270
    if crop:
        size = [0.6, 0.7] if crop == "relative_range" else [100, 130]
        tiny_cfg.INPUT.CROP.ENABLED, tiny_cfg.INPUT.CROP.TYPE = True, crop
        tiny_cfg.INPUT.CROP.SIZE = size
    for seed in range(6):
        assert_same(*both(tiny_cfg, record, seed), share=5e-3)  # small images vary more


@pytest.mark.parametrize(("size", "new"), [((480, 640), 800), ((427, 640), 600), ((640, 480), 400)])
def test_pixels_at_usual_sizes(tiny_cfg, write, size, new):
    """Less than 0.1 % of values differ, by 1."""
    tiny_cfg.INPUT.MIN_SIZE_TEST = new
    record = {"file_name": write(encode(photo(*size), quality=90)), "image_id": 1}
    fast, slow = both(tiny_cfg, record, 0, is_train=False)
    assert min(fast["image"].shape[1:]) == new
    assert_same(fast, slow, share=1e-3)


@pytest.mark.parametrize("scale", [0.2, 0.37, 0.5, 0.75, 1.3, 1.5, 2.0, 3.1])
def test_resize_at_simple_fractions(scale):
    """Many sums lie on a half: less than 3 % of values differ, by at most 2."""
    image = photo(240, 320)
    new = round(240 * scale), round(320 * scale)
    ours = FastResize(240, 320, *new).apply_image(image)
    theirs = T.ResizeTransform(240, 320, *new).apply_image(image)
    off = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape and off.max() <= 2 and (off > 0).mean() < 0.03


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_without_resize_pixels_are_equal(tiny_cfg, record, flip, image_format):
    """Decoding, flips and memory layout change no bit."""
    tiny_cfg.INPUT.FORMAT, tiny_cfg.INPUT.RANDOM_FLIP = image_format, flip
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.MAX_SIZE_TRAIN = (H,), 1000
    for seed in range(4):
        assert_same(*both(tiny_cfg, record, seed), share=0)


def jpegs():
    """Every kind of JPEG: name -> bytes."""
    image = Image.fromarray(photo())
    kinds = {
        f"chroma {s} quality {q}": encode(image, quality=q, subsampling=s)
        for s in (0, 1, 2)
        for q in (40, 95)
    }
    for orientation in range(10):  # 0 and 9 are invalid
        exif = Image.Exif()
        exif[274] = orientation
        kinds[f"exif {orientation}"] = encode(image, exif=exif)
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
        b'22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    return {
        **kinds,
        "progressive": encode(image, progressive=True, optimize=True),
        "gray": encode(image.convert("L")),
        "CMYK": encode(image.convert("CMYK")),
        "RGB inside": encode(image, keep_rgb=True),
        "turned by XMP": encode(image, xmp=xmp),
        "broken EXIF": encode(image, exif=b"Exif\0\0nonsense"),
        "two pictures": encode(image, "MPO", save_all=True, append_images=[image]),
        "trailing bytes": encode(image) + b"abc",
    }


JPEGS = jpegs()


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_jpegs_are_read_as_detectron2_reads_them(write, kind, image_format):
    """Equal pixels for every kind of file and orientation of the camera."""
    path = write(JPEGS[kind])
    expected = detection_utils.read_image(path, image_format)
    image = read_image(path, image_format)
    assert image.dtype == expected.dtype and np.array_equal(image, expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "turned"])
def test_pngs_are_read_as_detectron2_reads_them(write, mode):
    """Alpha, palettes and EXIF mean what they mean to Pillow."""
    image, options = Image.fromarray(photo()), {}
    if mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][274] = 6
    else:
        image = image.convert(mode)
    path = write(encode(image, "PNG", **options))
    expected = detection_utils.read_image(path, "BGR")
    assert np.array_equal(read_image(path, "BGR"), expected)


def test_jpegs_are_decoded_by_opencv(write, monkeypatch):
    """Detectron2's reader is called for the rare kinds only."""
    calls = []
    read = detection_utils.read_image
    monkeypatch.setattr(detection_utils, "read_image", lambda *a: calls.append(a) or read(*a))
    for kind, expected in [("chroma 2 quality 95", 0), ("exif 6", 0), ("gray", 0), ("CMYK", 1)]:
        read_image(write(JPEGS[kind]), "BGR")
        assert len(calls) == expected


def test_unreadable_exif_counts_as_upright(write, monkeypatch):
    """As in Detectron2."""

    def fail(self):
        raise SyntaxError("not a TIFF file")

    path = write(JPEGS["exif 6"])
    monkeypatch.setattr(Image.Image, "getexif", fail)
    expected = detection_utils.read_image(path, "BGR")
    assert expected.shape == (H, W, 3) and np.array_equal(read_image(path, "BGR"), expected)


def test_images_are_resized_by_torch(tiny_cfg, record, monkeypatch):
    """Not by Pillow; and a read-only image gives no warning of torch's."""
    expected = T.ResizeTransform(H, W, 97, 130).apply_image(photo())

    def fail(self, img, interp=None):
        raise AssertionError("resized by Pillow")

    monkeypatch.setattr(T.ResizeTransform, "apply_image", fail)
    tiny_cfg.INPUT.MIN_SIZE_TEST = 97
    for image_format in ("BGR", "RGB"):
        tiny_cfg.INPUT.FORMAT = image_format
        mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, False)
        assert mapper(record)["image"].shape == (3, 97, 130)
    read_only = np.asarray(Image.fromarray(photo()))
    assert not read_only.flags.writeable
    warn_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resized = FastResize(H, W, 97, 130).apply_image(read_only)
    finally:
        torch.set_warn_always(warn_always)
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_truncated_jpeg_raises_although_opencv_decodes_it(write, monkeypatch):
    """OpenCV 4 fills up the missing pixels."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((H, W, 3), np.uint8))
    data = encode(photo())
    assert not read_image(write(data), "BGR").any()
    with pytest.raises(ConfigError, match="truncated"):
        read_image(write(data[: len(data) // 2]), "BGR")


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
def test_unknown_format_raises(tiny_cfg, name):
    """When the mapper is built, not at the first image. Pillow's modes are known."""
    tiny_cfg.INPUT.MAPPER = name
    for image_format in ("BGR", "RGB", "YUV-BT.601", "L", "CMYK"):
        tiny_cfg.INPUT.FORMAT = image_format
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    tiny_cfg.INPUT.FORMAT = "GBR"
    with pytest.raises(ConfigError, match="INPUT.FORMAT: unknown 'GBR'; known: BGR"):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)


@pytest.mark.parametrize("broken", ["missing", "empty", "text", "half a JPEG", "half a PNG"])
def test_unreadable_image_raises(tiny_cfg, write, tmp_path, broken):
    """One line with the file's name; a truncated image is unreadable too."""
    jpeg, png = encode(photo()), encode(photo(), "PNG")
    contents = {
        "empty": b"",
        "text": b"not an image",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "half a PNG": png[: len(png) // 2],
    }
    missing = str(tmp_path / "no.jpg")
    path = missing if broken == "missing" else write(contents[broken])
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    with pytest.raises(ConfigError) as error:
        mapper({"file_name": path, "annotations": []})
    assert f"cannot read the image {path}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
def test_wrong_image_size_raises(tiny_cfg, record, name):
    """One line with the file, its size and that of the record."""
    tiny_cfg.INPUT.MAPPER = name
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    record["height"] += 1
    with pytest.raises(BadImageError) as error:
        mapper(record)
    text = str(error.value)
    assert record["file_name"] in text and "161" in text and "120" in text and "121" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "kind", ["integers", "a box of integers", "corners", "arrays", "none", "tuples"]
)
def test_boxes_of_any_kind(tiny_cfg, record, kind):
    """Integers, corners, arrays, tuples and no boxes at all: as in Detectron2."""
    made = record["annotations"]
    for i, annotation in enumerate(made):
        if kind == "integers" or (kind == "a box of integers" and i == 2):
            annotation["bbox"] = [3 + i, 5 * i, 31 + i, 17]
        if kind in ("corners", "arrays"):
            x, y, w, h = annotation["bbox"]
            corners = [x, y, x + w, y + h]
            annotation["bbox"] = np.array(corners) if kind == "arrays" else corners
            annotation["bbox_mode"] = BoxMode.XYXY_ABS
        if kind == "tuples":
            annotation["bbox"] = tuple(annotation["bbox"])
    if kind == "none":
        made.clear()
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.RANDOM_FLIP = (97,), "horizontal"
    for seed in range(3):
        assert_same(*both(tiny_cfg, record, seed), share=5e-3)


def test_crowds_are_dropped_or_marked(tiny_cfg, record):
    """Dropped as in Detectron2; kept and marked in gt_iscrowd if IGNORE_IOF_THRESH is set."""
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (97,)
    record["annotations"] = annotations(8, crowd=(0, 3))
    fast, slow = both(tiny_cfg, record, 0)
    assert_same(fast, slow, share=5e-3)
    assert len(fast["instances"]) == 5 and not fast["instances"].has("gt_iscrowd")
    tiny_cfg.MODEL.RETINANET.IGNORE_IOF_THRESH, tiny_cfg.INPUT.MAPPER = 0.5, "FastMapper"
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    kept = mapper(record)["instances"]
    assert kept.gt_iscrowd.tolist() == [True, False, False, True, False, False, False]
    assert kept.gt_classes.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(kept[~kept.gt_iscrowd].gt_boxes.tensor, fast["instances"].gt_boxes.tensor)
    record["annotations"] = []
    empty = mapper(record)["instances"].gt_iscrowd
    assert empty.dtype == torch.bool and len(empty) == 0


def test_input_record_is_not_changed(tiny_cfg, record):
    """Nor does the output share anything with it."""
    before = copy.deepcopy(record)
    output = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)
    output["extra"].append(3)
    output["instances"].gt_boxes.tensor.zero_()
    assert record == before


def test_inference_drops_the_annotations(tiny_cfg, record):
    """It takes the test size, flips nothing, and adds the file's height and width."""
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.RANDOM_FLIP = 97, "horizontal"
    del record["height"], record["width"]
    fast, slow = both(tiny_cfg, record, 3, is_train=False)
    assert_same(fast, slow, share=5e-3)
    assert fast.keys() == {"file_name", "image_id", "extra", "image", "height", "width"}


def test_semantic_labels_as_in_detectron2(tiny_cfg, record, tmp_path):
    """Resized to the nearest label, and flipped with the image."""
    labels = (photo()[:, :, 0] // 40).astype(np.uint8)
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    Image.fromarray(labels).save(record["sem_seg_file_name"])
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.RANDOM_FLIP = (97,), "horizontal"
    for seed in range(3):
        fast, slow = both(tiny_cfg, record, seed)
        assert torch.equal(fast.pop("sem_seg"), slow.pop("sem_seg"))
        assert_same(fast, slow, share=5e-3)


@pytest.mark.parametrize("flip", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_to_tensor_of_any_view(flip, dtype, channels):
    """Flipped, cropped and planar views give the same tensor as NumPy's copy."""
    image = np.random.default_rng(0).integers(0, 255, (40, 50, channels)).astype(dtype)
    planar = image.transpose(2, 0, 1).copy().transpose(1, 2, 0)
    for view in (image, image[3:30, 5:41], planar):
        view = np.flip(view, flip)
        view.flags.writeable = False  # like Pillow's arrays
        tensor = image_to_tensor(view)
        assert torch.equal(tensor, torch.from_numpy(view.transpose(2, 0, 1).copy()))
        assert tensor.is_contiguous()


def test_other_augmentations_equal_detectron2s(record):
    """Any list of them; Pillow does a resize that is not bilinear."""
    bicubic = T.Resize((90, 130), interp=Image.BICUBIC)
    augmentations = [T.RandomBrightness(0.5, 1.5), T.RandomRotation([-20, 20]), bicubic]
    arguments = {"is_train": True, "augmentations": augmentations, "image_format": "BGR"}
    outputs = []
    for mapper in (FastMapper(**arguments), Detectron2DatasetMapper(**arguments)):
        np.random.seed(0)
        outputs.append(mapper(record))
    assert_same(*outputs, share=0)


def test_works_in_a_data_loaders_worker(tiny_cfg, record):
    """A forked process gives the same image as this one."""
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, False)
    loader = DataLoader([record] * 2, num_workers=1, collate_fn=lambda r: mapper(r[0]), timeout=60)
    expected = mapper(record)["image"]
    assert all(torch.equal(output["image"], expected) for output in loader)


@pytest.mark.parametrize("key", ["MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"])
def test_masks_keypoints_and_proposals_raise(tiny_cfg, key):
    """One line that names the key and the mapper to set."""
    tiny_cfg.MODEL[key] = True
    with pytest.raises(ConfigError, match=rf"MODEL\.{key}: .*INPUT\.MAPPER DatasetMapper"):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)


def test_detectron2s_mapper_with_ignore_iof_thresh_raises(tiny_cfg):
    """In training only: it drops the crowd boxes that the key needs."""
    tiny_cfg.INPUT.MAPPER, tiny_cfg.MODEL.RETINANET.IGNORE_IOF_THRESH = "DatasetMapper", 0.5
    with pytest.raises(ConfigError, match="IGNORE_IOF_THRESH .*INPUT.MAPPER FastMapper"):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    assert isinstance(DATASET_MAPPER_REGISTRY.build(tiny_cfg, False), DatasetMapper)


BAD_ANNOTATIONS = {
    "no bbox": (lambda a: a.pop("bbox"), "has no bbox"),
    "bbox null": (lambda a: a.update(bbox=None), "has no bbox"),
    "no bbox_mode": (lambda a: a.pop("bbox_mode"), "has no bbox_mode"),
    "relative": (lambda a: a.update(bbox_mode=BoxMode.XYWH_REL), "not XYWH_ABS or XYXY_ABS"),
    "no category": (lambda a: a.pop("category_id"), "has no category_id"),
    "category as text": (lambda a: a.update(category_id="3"), "has category_id '3'"),
    "category -1": (lambda a: a.update(category_id=-1), "has category_id -1"),
    "NaN": (lambda a: a.update(bbox=[1, 2, float("nan"), 4]), "is not finite"),
    "infinite": (lambda a: a.update(bbox=[1, 2, float("inf"), 4]), "is not finite"),
    "huge": (lambda a: a.update(bbox=[1, 2, 1e30, 4]), "lies far outside any image"),
    "negative": (lambda a: a.update(bbox=[60, 50, -5, 4]), "with a negative width or height"),
    "corners": (
        lambda a: a.update(bbox=[60, 50, 5, 4], bbox_mode=BoxMode.XYXY_ABS),
        "with a negative width or height",
    ),
    "3 numbers": (lambda a: a.update(bbox=[1, 2, 3]), "which is not 4 numbers"),
    "5 numbers": (lambda a: a.update(bbox=[1, 2, 3, 4, 5]), "which is not 4 numbers"),
    "strings": (lambda a: a.update(bbox=["1", "2", "3", "4"]), "which is not 4 numbers"),
    "a number": (lambda a: a.update(bbox=7), "which is not 4 numbers"),
}


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
@pytest.mark.parametrize("fault", BAD_ANNOTATIONS)
def test_bad_annotation_raises(tiny_cfg, record, fault, name):
    """One line with the file and the annotation, for records that no check has seen."""
    tiny_cfg.INPUT.MAPPER = name
    edit, text = BAD_ANNOTATIONS[fault]
    edit(record["annotations"][2])
    with pytest.raises(ConfigError) as error:
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)
    line = str(error.value)
    assert (
        line.startswith(f"{record['file_name']}: annotation number 3 {text}"[:90]) or text in line
    )
    assert "annotation number 3 " in line and text in line and "\n" not in line
    record["annotations"][2]["id"] = 77
    with pytest.raises(ConfigError, match=r"annotation id 77 "):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)
    assert "instances" not in DATASET_MAPPER_REGISTRY.build(tiny_cfg, False)(record)


def test_bad_annotation_in_a_worker_is_named(tiny_cfg, record):
    """The line is the last one of the worker's traceback."""
    record["annotations"][0]["bbox"] = None
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    loader = DataLoader([record], num_workers=1, collate_fn=lambda r: mapper(r[0]))
    with pytest.raises(ConfigError) as error:
        list(loader)
    last = str(error.value).strip().splitlines()[-1]
    assert f"{record['file_name']}: annotation number 1 has no bbox" in last


def test_bad_crowd_that_is_dropped_does_not_matter(tiny_cfg, record):
    """Nothing reads its box."""
    record["annotations"][0].update(bbox=[1], iscrowd=1)
    tiny_cfg.INPUT.MAPPER = "FastMapper"
    assert len(DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)["instances"]) == 4
    tiny_cfg.MODEL.RETINANET.IGNORE_IOF_THRESH = 0.5
    with pytest.raises(ConfigError, match="annotation number 1 has bbox"):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)


@pytest.mark.parametrize("name", ["FastMapper", "DatasetMapper"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "size"])
def test_bad_images_can_be_skipped(tiny_cfg, record, log, tmp_path, name, fault):
    """In a training: one warning a file. In an evaluation they stay an error."""
    if fault == "missing":
        record["file_name"] = str(tmp_path / "no.jpg")
    elif fault == "truncated":
        path = tmp_path / "image"
        path.write_bytes(path.read_bytes()[:-900])
    else:
        record["width"] += 1
    tiny_cfg.INPUT.MAPPER = name
    with pytest.raises(BadImageError):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)
    tiny_cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    mapper = DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)
    assert mapper(record) is None and mapper(record) is None
    (line,) = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert line.startswith("Skipped, the 1. of this process: ") and record["file_name"] in line
    with pytest.raises(BadImageError):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, False)(record)


def test_bad_annotations_are_never_skipped(tiny_cfg, record):
    """Only images are."""
    tiny_cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    record["annotations"][0]["bbox"] = None
    with pytest.raises(ConfigError):
        DATASET_MAPPER_REGISTRY.build(tiny_cfg, True)(record)


def test_mappers_are_built_from_a_config_directly(tiny_cfg, record):
    """``DatasetMapper(cfg, is_train=True)`` is Detectron2's own call."""
    tiny_cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    record["width"] += 1
    assert DatasetMapper(tiny_cfg, is_train=True)(record) is None
