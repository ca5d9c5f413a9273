"""The page: nothing from the data is read as HTML, nothing is loaded from elsewhere."""

import html.parser
import json

import pytest

from retina_plugin.doctor import Finding, Report, Severity, StepCost, examine_training, write_report
from retina_plugin.doctor.page import render_page
from tests.doctor.examples import config, record
from tests.doctor.test_report import GOOD, dataset  # noqa: F401

VOID = {"meta", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """The tags and the text of a page; fails at a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def full_report(register, names=("a", "b"), file="a.jpg"):
    thin = [record([(10, 10, 140, 16)] * 3, name=file, classes=[0, 1, 1]) for _ in range(12)]
    report = Report("c.yaml", ("KEY", "<b>"))
    cost = StepCost(0.25, 2**30, 2**34, 16, 1, "cpu (1 threads)")
    examine_training(config(*register(thin + GOOD, names)), report, lambda: cost)
    return report


def test_page_has_every_finding_and_figure(dataset):  # noqa: F811
    report = full_report(dataset)
    page = Page(render_page(report))
    for _, finding in report.findings:
        assert finding.what in page.text and finding.fix in page.text
    for heading in ("Do the anchors fit", "Anchors that fit better", "first iterations", "Classes"):
        assert heading in page.text
    assert "ASPECT_RATIOS" in page.text and report.summary() in page.text


NAMES = [
    "<script>alert(1)</script>",
    "a & b",
    "\"quoted\" 'name'",
    "$x$ {{ 7*7 }}",
    "größer 猫",
    "</td>",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(dataset, name):  # noqa: F811
    report = full_report(dataset, (name, "other"), f"{name}.jpg")
    plain = Page(render_page(full_report_again(report)))
    assert plain.tags.count("script") == 0
    assert plain.text.count(name) >= 3  # classes twice, and the file of an unreached box
    assert plain.text.count(f"{name}.jpg") >= 1


def full_report_again(report):
    """The same report; rendering must not change it."""
    render_page(report)
    return report


def test_page_loads_nothing(dataset):  # noqa: F811
    text = render_page(full_report(dataset))
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href")]
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_page_without_measurements():
    page = Page(render_page(Report("c.yaml")))
    assert "Nothing was found." in page.text and "0 errors" in page.text


def test_dark_and_light():
    text = render_page(Report("c.yaml"))
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text


def test_files_hold_any_file_name(tmp_path):
    """A name whose bytes are no UTF-8 is a string with surrogates in Python."""
    report = Report("c.yaml")
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    report.run("images", lambda: [Finding(Severity.ERROR, name, "is cut")])
    json_file, page = write_report(report, tmp_path / "new" / "folder")
    assert json.loads(json_file.read_text())["findings"][0]["where"] == name
    assert "caf\\udce9.jpg" in page.read_text(encoding="utf-8")
