"""The report as files: ``report.html``, which needs no server or network, and ``report.json``."""

from __future__ import annotations

import importlib.resources
import json
import logging
import os
import time
from pathlib import Path

from retina_plugin.cache import atomic_write
from retina_plugin.optional import optional

from .charts import MOST_CLASSES, class_data, confused_classes, figures
from .gallery import Gallery, Picture
from .result import Analysis

__all__ = ["render_page", "write_report"]

logger = logging.getLogger("retina_plugin")

_MOST_IMAGES = 200  # rows of the table of images
_MOST_CONFUSIONS = 50  # rows of the table of swapped classes

# kind of a case -> heading and explanation of its part of the gallery
_KINDS = {
    "false_positive": (
        "False positives",
        "Detections that fit no object, the most confident first. A box that is off is among them.",
    ),
    "miss": ("Misses", "Objects that were not found, the largest first."),
    "swap": (
        "Wrong class",
        "The box is right, the class is not. The most confident come first.",
    ),
    "suspect": (
        "Suspected label errors",
        "Confident detections that contradict the annotation. Look whether the annotation is right "
        "before you blame the model.",
    ),
}


def write_report(analysis: Analysis, folder: str | os.PathLike, *, model: str = "") -> Path:
    """Write ``report.html`` and ``report.json``, and return the path of the page.

        page = write_report(analyze("digits_scenes_val", "predictions.json"), "out")

    The page is one file: scripts and pictures are inside. Images that cannot be read are grey on
    it, listed at its end and counted in a warning.

    Args:
        folder: is made if it is not there. Files of an earlier report are replaced.
        model: what the page calls the model, such as its config and weights.

    Raises:
        ConfigError: plotly is not installed.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    html = render_page(analysis, model)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "report.json") as temporary:
        temporary.write_text(analysis.to_json(), encoding="ascii")
    with atomic_write(folder / "report.html") as temporary:
        # a file name may hold bytes that are no text
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def render_page(analysis: Analysis, model: str = "") -> str:
    """The HTML page. All text from files is escaped.

    Raises:
        ConfigError: plotly is not installed.
    """
    import jinja2  # which no training needs

    plotly = optional("plotly.offline", "retina report")
    gallery = Gallery(analysis)
    cases = {kind: [gallery.case(c) for c in found] for kind, found in analysis.cases.items()}
    changed = _changed(analysis, gallery)
    if gallery.unreadable:
        logger.warning(
            "Grey on the page, because they cannot be read: %d of the images, such as %s",
            *(len(gallery.unreadable), next(iter(gallery.unreadable.values()))),
        )
    files = importlib.resources.files(__package__) / "page"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["one"] = lambda x: "–" if x is None else f"{x:.1f}"
    environment.filters["two"] = lambda x: "–" if x is None else f"{x:.2f}"
    environment.filters["signed"] = lambda x: "–" if x is None else f"{x:+.1f}"
    template = environment.from_string((files / "report.html").read_text("utf-8"))
    return template.render(
        analysis=analysis,
        objects=int((~analysis.truth.crowds).sum()),
        model=model,
        written=time.strftime("%Y-%m-%d %H:%M"),
        kinds=[(kind, *_KINDS[kind], cases[kind]) for kind in _KINDS if cases.get(kind)],
        changed=changed,
        images=_worst_images(analysis),
        confusions=_confusions(analysis),
        confused=len(confused_classes(analysis)),
        most_classes=MOST_CLASSES,
        unreadable=gallery.unreadable,
        css=(files / "report.css").read_text("utf-8"),
        script=(files / "report.js").read_text("utf-8"),
        plotly=plotly.get_plotlyjs(),
        figures=_in_script(figures(analysis)),
        classes=_in_script(class_data(analysis)),
    )


def _in_script(content: object) -> str:
    """JSON that can stand in a <script>: no text of it ends the element."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def _worst_images(analysis: Analysis) -> list[int]:
    """Indices of the images with the most mistakes; those without one are left out."""
    mistakes = [image.wrong + image.missed for image in analysis.images]
    order = sorted(range(len(mistakes)), key=lambda i: -mistakes[i])
    return [i for i in order[:_MOST_IMAGES] if mistakes[i]]


def _confusions(analysis: Analysis) -> list[tuple[int, int, int]]:
    """(object's class, class it is taken for, count), the most frequent first."""
    classes = analysis.confusion[:-1, :-1]  # the last is background
    pairs = [(i, j, int(classes[i, j])) for i, j in zip(*classes.nonzero()) if i != j]
    return sorted(pairs, key=lambda pair: -pair[2])[:_MOST_CONFUSIONS]


def _changed(analysis: Analysis, gallery: Gallery) -> list[tuple[Picture, Picture]]:
    """The images that changed most: with the other model's detections, and with this one's."""
    if analysis.comparison is None:
        return []
    found = []
    for image, before, after in analysis.comparison.changed:
        other = gallery.whole(image, analysis.comparison.other, f"other model: {before} mistakes")
        this = gallery.whole(image, analysis.shown, f"this model: {after} mistakes")
        found.append((other, this))
    return found
