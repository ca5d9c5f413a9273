"""Pascal VOC: a folder with ``Annotations`` (XML), ``JPEGImages`` and ``ImageSets/Main``.

Where these folders are missing, as tools such as LabelImg leave it, the folder itself (with its
folders) has the XML files beside the images.

- **Boxes** count pixels from 1, and the last one is included: xmin 1 and xmax W is the whole image.
  Detectron2's ``load_voc_instances`` reads them so. An xmin of 0, which some tools write, stays 0.
- **Difficult** objects are neither found nor missed in VOC's evaluation. They become crowds, which
  is that in COCO's. A training leaves them out; ``MODEL.RETINANET.IGNORE_IOF_THRESH`` makes
  anchors on them neither positive nor negative.
- **Classes** are those of ``labels.txt`` in its order, or else of all files of the folder, sorted.
  So the splits of a folder number them alike.
- **Images** have the name of their XML file, or else the one in ``<filename>``.
"""

from __future__ import annotations

import os
import xml.parsers.expat
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

from retina_plugin.errors import ConfigError, check_choice, did_you_mean

from ..images import image_suffixes
from .content import (
    Box,
    Content,
    Source,
    image_size,
    list_files,
    read_labels,
    read_text,
    sort_classes,
    to_number,
)
from .spec import Spec

__all__ = ["find"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Folders(NamedTuple):
    root: str
    annotations: str
    images: str
    split_file: str  # "" for all images


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # as they are written
    difficult: bool


class _File(NamedTuple):
    """An XML file."""

    filename: str
    size: tuple[int, int] | None
    objects: list[_Object]


def find(spec: Spec) -> Source:
    """The files of a folder.

    Raises:
        ConfigError: there is no such folder or split, or it has no XML files.
    """
    folders = _find_folders(spec)
    xml_files = list_files(folders.annotations, {".xml"})
    if not xml_files:
        raise ConfigError(f"{folders.annotations}: has no XML files: name a folder in VOC's format")
    images = list_files(folders.images, image_suffixes())
    extra = [os.path.join(folders.root, "labels.txt")] + [folders.split_file] * bool(spec.rest)
    return Source([*xml_files, *images, *extra], lambda: _convert(folders, xml_files, images))


def _find_folders(spec: Spec) -> _Folders:
    root = spec.path
    if not os.path.isdir(root):
        raise ConfigError(f"there is no folder {root}: voc:FOLDER names the one of Annotations/")
    annotations = os.path.join(root, "Annotations")
    annotations = annotations if os.path.isdir(annotations) else root
    folders = (os.path.join(root, name) for name in ("JPEGImages", "images"))
    images = next(filter(os.path.isdir, folders), annotations)
    split_file = ""
    if spec.rest:
        splits = os.path.join(root, "ImageSets", "Main")
        if not os.path.isdir(splits):
            raise ConfigError(
                f"{root}: has no splits in ImageSets/Main: leave out ':{spec.rest}' for all images"
            )
        known = [os.path.splitext(os.path.basename(x))[0] for x in list_files(splits, {".txt"})]
        check_choice(f"{root}: split", spec.rest, known)
        split_file = os.path.join(splits, f"{spec.rest}.txt")
    return _Folders(root, annotations, images, split_file)


def _convert(
    folders: _Folders, xml_files: list[str], images: list[str]
) -> tuple[dict[str, Any], str]:
    read = {path: _read(path) for path in xml_files}
    labels = read_labels(folders.root)
    classes = labels or sort_classes(o.name for file in read.values() for o in file.objects)
    if not classes:
        raise ConfigError(
            f"{folders.annotations}: no file has an object: name the classes in labels.txt"
        )
    numbers = {name: k for k, name in enumerate(classes)}
    by_stem: dict[str, list[str]] = {}
    for path in images:
        by_stem.setdefault(_stem(path, folders.images), []).append(path)
    content = Content(classes)
    for path in _chosen(folders, xml_files):
        file = read[path]
        for i, name in enumerate(o.name for o in file.objects):
            if name not in numbers:
                raise ConfigError(
                    f"{path}, line {_line_of_object(path, i)}: the class '{name}' is not in "
                    f"{os.path.join(folders.root, 'labels.txt')}{did_you_mean(name, classes)}"
                )
        image = _image_of(path, file, folders, by_stem)
        if image in content.images:
            raise ConfigError(f"{path}: the image {image} has another XML file too: remove one")
        boxes = [_box(o, numbers[o.name]) for o in file.objects]
        content.images[image] = (file.size or image_size(image, path), boxes)
    return content.to_coco(folders.images)


def _stem(path: str, folder: str) -> str:
    """A path within a folder, without its ending."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _chosen(folders: _Folders, xml_files: list[str]) -> Iterator[str]:
    """The XML files of the split."""
    if not folders.split_file:
        yield from xml_files
        return
    by_stem = {_stem(path, folders.annotations): path for path in xml_files}
    used = set()
    for number, line in enumerate(read_text(folders.split_file).splitlines(), start=1):
        name = line.strip()
        if name not in by_stem and len(name.split()) == 2:
            # Lists of one class, such as car_train.txt, say after the name whether it is there.
            name, there = name.split()
            if there not in ("1", "0", "-1"):
                name = line.strip()
        if not name or name in used:
            continue
        if name not in by_stem:
            raise ConfigError(
                f"{folders.split_file}, line {number}: there is no {name}.xml in "
                f"{folders.annotations}"
            )
        used.add(name)
        yield by_stem[name]
    if not used:
        raise ConfigError(f"{folders.split_file}: names no images")


def _image_of(path: str, file: _File, folders: _Folders, by_stem: dict[str, list[str]]) -> str:
    """The image of an XML file. Where none is there, the doctor says so."""
    stem = _stem(path, folders.annotations)
    named = os.path.basename(file.filename.replace("\\", "/"))
    candidates = by_stem.get(stem, [])
    for candidate in candidates:
        if os.path.basename(candidate) == named:  # a.jpg and a.png may both be there
            return candidate
    if candidates:
        return candidates[0]
    folder = os.path.join(folders.images, os.path.dirname(stem))
    in_folder = os.path.join(folder, named)
    if named and os.path.isfile(in_folder):
        return in_folder
    ending = os.path.splitext(named)[1] or ".jpg"
    return os.path.join(folders.images, stem + ending)


def _box(found: _Object, category: int) -> Box:
    x1, y1, x2, y2 = found.corners
    # 0 counts from 0: it is not shifted out of the image.
    x1, y1 = (max(v - 1.0, min(v, 0.0)) for v in (x1, y1))
    return Box(category, x1, y1, x2 - x1, y2 - y1, found.difficult)


def _read(path: str) -> _File:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, _ = error.position
        what = xml.parsers.expat.ErrorString(error.code)
        raise ConfigError(f"{path}, line {line}: is not XML: {what}") from None
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise ConfigError(f"{path}, line 1: is not XML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if root.tag != "annotation":
        raise ConfigError(f"{path}, line 1: <{root.tag}> is not VOC's <annotation>")
    objects = []
    for i, node in enumerate(root.findall("object")):
        found, fault = _read_object(node)
        if found is None:
            raise ConfigError(f"{path}, line {_line_of_object(path, i)}: the object {fault}")
        objects.append(found)
    sides = [to_number(root.findtext(f"size/{key}", "")) for key in ("width", "height")]
    width, height = (int(side) if side is not None and side >= 1 else 0 for side in sides)
    size = (width, height) if width and height else None
    return _File(root.findtext("filename", "").strip(), size, objects)


def _read_object(node: ElementTree.Element) -> tuple[_Object | None, str]:
    """The object, or what is wrong with it."""
    name = node.findtext("name", "").strip()
    if not name:
        return None, "has no <name>"
    box = node.find("bndbox")
    if box is None:
        return None, f"'{name}' has no <bndbox>"
    texts = [box.findtext(key, "").strip() for key in _CORNERS]
    corners = [to_number(text) for text in texts]
    for key, text, value in zip(_CORNERS, texts, corners):
        if value is None:
            return None, f"'{name}' has the {key} '{text}', which is no number"
    x1, y1, x2, y2 = (value for value in corners if value is not None)
    if x2 < x1 or y2 < y1:
        return None, f"'{name}' has {x1:g}, {y1:g}, {x2:g}, {y2:g}: xmax or ymax is below its min"
    difficult = node.findtext("difficult", "0").strip().lower() in ("1", "true")
    return _Object(name, (x1, y1, x2, y2), difficult), ""


def _line_of_object(path: str, index: int) -> int:
    """The line of the object with this number. ElementTree does not keep it."""
    lines: list[int] = []
    depth = 0
    parser = xml.parsers.expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth == 2 and tag == "object":
            lines.append(parser.CurrentLineNumber)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartElementHandler, parser.EndElementHandler = start, end
    with open(path, "rb") as file:
        parser.ParseFile(file)
    return lines[index]
