"""The report as files: ``doctor.json`` and ``doctor.html``, which needs no server or network."""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path

from .recall import percent
from .report import Report

__all__ = ["render_page", "write_report"]


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write ``doctor.json`` and ``doctor.html``, and return their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    json_file, page = folder / "doctor.json", folder / "doctor.html"
    json_file.write_text(report.to_json() + "\n", encoding="ascii")
    # a file name may hold bytes that are no text
    page.write_text(render_page(report), encoding="utf-8", errors="backslashreplace")
    return json_file, page


def render_page(report: Report) -> str:
    """The HTML page. All text from config and dataset is escaped."""
    import jinja2  # which no training needs

    source = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    return environment.from_string(source).render(
        report=report, written=time.strftime("%Y-%m-%d %H:%M")
    )
