"""The files of a page and how its folder is written. test_browser.py runs it."""

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from html.parser import HTMLParser

import pytest

from retina_plugin.cli import export
from retina_plugin.deploy.page import (
    ONNXRUNTIME_WEB,
    check_page,
    fetch_onnxruntime_web,
    write_page,
)
from retina_plugin.errors import ConfigError
from tests.deploy.echo import write_echo

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module")
def static(repo):
    return repo / "retina_plugin" / "deploy" / "page"


def test_no_file_names_an_outside_host(static):
    names = {file.name for file in static.iterdir()}
    assert {"index.html", "page.css", "page.js", "worker.js"} <= names
    for file in static.iterdir():
        # the name of the format, which is no address
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"//[\w-]+(\.[\w-]+)+|https?:|wss?:|ftp:", text), file.name


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_policy_allows_this_origin_only(static):
    tags = _Tags((static / "index.html").read_text()).tags
    (policy,) = (a["content"] for _, a in tags if "http-equiv" in a)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    values = {value for text in directives.values() for value in text.split()}
    assert values == {"'self'", "'none'", "'wasm-unsafe-eval'", "blob:"}
    assert directives["connect-src"] == "'self'" and directives["form-action"] == "'none'"
    # what the policy would block
    for tag, attributes in tags:
        assert tag != "style" and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or "src" in attributes


def test_every_file_that_is_asked_for_is_there(static):
    names = {file.name for file in static.iterdir()} | set(RUNTIME) | {"models.json"}
    for file in static.glob("*.js"):
        text = file.read_text()
        asked = re.findall(r'from "\./([^"]+)"|new URL\("([^"]+)"|fetchFile\("([^"]+)"\)', text)
        assert {name for group in asked for name in group if name} <= names, file.name
    for _, attributes in _Tags((static / "index.html").read_text()).tags:
        for key in ("src", "href"):
            assert attributes.get(key, "index.html") in names


def test_every_input_has_a_label(static):
    """What a screen reader says."""
    text = (static / "index.html").read_text()
    tags = _Tags(text).tags
    labelled = {a.get("for") for tag, a in tags if tag == "label"}
    for tag, attributes in tags:
        if tag == "input":
            inside = re.search(rf'<label[^>]*>\s*<input id="{attributes["id"]}"', text)
            assert inside or attributes["id"] in labelled or "aria-label" in attributes


def package(path, name="onnxruntime-web", files=RUNTIME):
    """An npm package of this name; its files hold their own names."""
    with tarfile.open(path, "w:gz") as archive:
        about = json.dumps({"name": name, "version": "0.0.1"}).encode()
        for file, content in {
            "package.json": about,
            **{f"dist/{file}": file.encode() for file in files},
        }.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_folder_has_the_page_the_model_and_the_runtime(static, tmp_path):
    model = write_echo(tmp_path / "birds.onnx")
    second = write_echo(tmp_path / "birds_int8.onnx", quantized="int8")
    runtime = package(tmp_path / "web.tgz")
    index = write_page(model, tmp_path / "out", onnxruntime_web=runtime, second=second)
    assert index == tmp_path / "out" / "index.html"
    names = {file.name for file in static.iterdir()}
    expected = names | set(RUNTIME) | {"models.json", "model.onnx", "second.onnx"}
    assert {path.name for path in index.parent.iterdir()} == expected
    assert (index.parent / "model.onnx").read_bytes() == model.read_bytes()
    assert (index.parent / RUNTIME[0]).read_text() == RUNTIME[0]
    assert json.loads((index.parent / "models.json").read_text()) == [
        {"file": "model.onnx", "name": "birds"},
        {"file": "second.onnx", "name": "birds_int8"},
    ]
    # again, of the model that lies in the folder, and without the second
    write_page(index.parent / "model.onnx", index.parent, onnxruntime_web=runtime)
    assert {path.name for path in index.parent.iterdir()} == expected - {"second.onnx"}
    assert (index.parent / "model.onnx").read_bytes() == model.read_bytes()


@pytest.fixture
def others(tmp_path):
    """A folder of the user's: a page and two models that are not ours to replace."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("index.html", "model.onnx", "second.onnx", "notes.txt"):
        (folder / name).write_text(f"the user's {name}")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_that_are_not_of_an_earlier_page_are_kept(others, tmp_path):
    """Before a model is exported, too. `overwrite` replaces what the page needs, and no more."""
    model, runtime = write_echo(tmp_path / "birds.onnx"), package(tmp_path / "web.tgz")
    before = contents(others)
    for name in ("model.onnx", "index.html"):
        for function in (check_page, write_page):
            with pytest.raises(ConfigError, match=rf"{name} is there already .* --overwrite"):
                function(model, others, onnxruntime_web=runtime)
        assert contents(others) == before
        del before[name]
        (others / name).unlink()
    write_page(model, others, onnxruntime_web=runtime)
    assert {name: contents(others)[name] for name in before} == before

    # a second.onnx that the page does not list is not the page's
    with pytest.raises(ConfigError, match=r"second.onnx is there already"):
        write_page(model, others, onnxruntime_web=runtime, second=model)
    assert {name: contents(others)[name] for name in before} == before
    write_page(model, others, onnxruntime_web=runtime, second=model, overwrite=True)
    assert (others / "second.onnx").read_bytes() == model.read_bytes()
    assert (others / "notes.txt").read_bytes() == before["notes.txt"]


@pytest.mark.parametrize(
    ("model", "second", "lost"),
    [
        ("site/half.onnx", "site/model.onnx", "model.onnx"),
        ("site/second.onnx", None, "second.onnx"),
        ("site/second.onnx", "site/model.onnx", "second.onnx"),
    ],
)
def test_page_does_not_replace_its_own_sources(model, second, lost, tmp_path):
    """The folder's model.onnx is the first model, its second.onnx the second one."""
    (tmp_path / "site").mkdir()
    runtime = package(tmp_path / "web.tgz")
    for number, name in enumerate(("half.onnx", "model.onnx", "second.onnx")):
        write_echo(tmp_path / "site" / name, topk_candidates=100 + number)
    before = contents(tmp_path / "site")
    options = {"onnxruntime_web": runtime, "second": second and tmp_path / second}
    for function in (check_page, write_page):
        for overwrite in (False, True):
            message = rf"--page .*site: its {lost} would not be .*{lost}: choose another folder"
            with pytest.raises(ConfigError, match=message):
                function(tmp_path / model, tmp_path / "site", overwrite=overwrite, **options)
    assert contents(tmp_path / "site") == before


def test_command_refuses_the_folder_before_it_exports(others, tmp_path):
    before = contents(others)
    command = ["--config-file", "none.yaml", "--weights", "none.pth", "--page", str(others)]
    command += ["--onnxruntime-web", str(package(tmp_path / "web.tgz")), "--output"]
    for output, message in [
        (tmp_path / "new.onnx", r"model.onnx is there already"),
        (others / "second.onnx", r"its second.onnx would not be"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export.main([*command, str(output)])
    with pytest.raises(ConfigError, match=r"none.yaml"):
        export.main([*command, str(tmp_path / "new.onnx"), "--overwrite"])
    assert contents(others) == before


@pytest.mark.usefixtures("user_mappers")
def test_command_refuses_a_mapper_before_it_exports(repo, tmp_path):
    (tmp_path / "weights.pth").touch()
    command = ["--config-file", str(repo / "configs/_base_/digits_R18.yaml"), "--weights"]
    command += [str(tmp_path / "weights.pth"), "--output", str(tmp_path / "a.onnx"), "--page"]
    command += [str(tmp_path / "out"), "--onnxruntime-web", str(package(tmp_path / "web.tgz"))]
    with pytest.raises(ConfigError, match="--page: INPUT.MAPPER GreyMapper is one that prepares"):
        export.main([*command, "INPUT.MAPPER", "GreyMapper"])


def test_models_of_one_name_have_their_folders_names(tmp_path):
    for folder in ("first", "other"):
        (tmp_path / folder).mkdir()
        write_echo(tmp_path / folder / "model.onnx")
    runtime = package(tmp_path / "web.tgz")
    models = [tmp_path / folder / "model.onnx" for folder in ("first", "other")]
    write_page(models[0], tmp_path / "out", onnxruntime_web=runtime, second=models[1])
    entries = json.loads((tmp_path / "out" / "models.json").read_text())
    assert [entry["name"] for entry in entries] == ["first/model", "other/model"]


def test_models_that_no_page_can_run_are_refused(tmp_path):
    runtime = package(tmp_path / "web.tgz")
    good = write_echo(tmp_path / "good.onnx")
    boxes = write_echo(tmp_path / "boxes.onnx", stage="boxes")
    other = write_echo(tmp_path / "other.onnx", "")
    grey = write_echo(tmp_path / "grey.onnx", resampler="custom")
    for bad, message in [
        (boxes, "boxes.onnx was exported with --output-stage boxes: a page needs the stage nms"),
        (other, "other.onnx has no metadata of retina_plugin"),
        (grey, "grey.onnx was exported with an INPUT.MAPPER that .* which a page cannot: set"),
        (tmp_path / "missing.onnx", "missing.onnx does not exist"),
    ]:
        for arguments in ({"model": bad}, {"model": good, "second": bad}):
            with pytest.raises(ConfigError, match=message):
                write_page(output=tmp_path / "out", onnxruntime_web=runtime, **arguments)
    assert not (tmp_path / "out").exists()


def test_packages_that_are_not_onnxruntime_web_are_refused(tmp_path):
    model = write_echo(tmp_path / "model.onnx")
    (tmp_path / "text.tgz").write_text("hello")
    cut = package(tmp_path / "cut.tgz")
    cut.write_bytes(cut.read_bytes()[:-50])
    for bad, message in [
        (tmp_path / "missing.tgz", "--onnxruntime-web: .*missing.tgz does not exist"),
        (tmp_path / "text.tgz", "is no npm package, or damaged"),
        (cut, "is no npm package, or damaged"),
        (tmp_path, "is no npm package, or damaged"),
        (package(tmp_path / "vue.tgz", "vue"), "is the package vue"),
        (package(tmp_path / "few.tgz", files=RUNTIME[1:]), "few.tgz lacks .*ort.wasm.min.mjs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            write_page(model, tmp_path / "out", onnxruntime_web=bad)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    model = write_echo(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="--page: cannot write .*model.onnx"):
        write_page(model, model, onnxruntime_web=package(tmp_path / "web.tgz"))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a shell script in the place of npm, and an empty cache in that of the user's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "cache"))

    def install(script):
        (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "npm").chmod(0o755)

    return install


def test_package_is_fetched_once_and_checked(npm, tmp_path):
    content = package(tmp_path / "web.tgz").read_bytes()
    name = f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"
    npm(f'echo "$*" >>{tmp_path}/calls; cp {tmp_path}/web.tgz {name}')
    cached = tmp_path / "cache" / name
    with pytest.raises(ConfigError, match="has another SHA-512 than the published one"):
        fetch_onnxruntime_web()
    assert not cached.exists()
    integrity = base64.b64encode(hashlib.sha512(content).digest()).decode()
    for _ in range(2):
        assert fetch_onnxruntime_web(integrity) == cached
        assert cached.read_bytes() == content
    assert (tmp_path / "calls").read_text().count(f"pack onnxruntime-web@{ONNXRUNTIME_WEB}") == 2


def test_npm_that_fails_is_one_line_with_the_way_out(npm, monkeypatch):
    npm("echo 'npm error code EAI_AGAIN' >&2; echo more >&2; exit 1")
    with pytest.raises(ConfigError, match="npm error code EAI_AGAIN.*--onnxruntime-web"):
        fetch_onnxruntime_web()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="needs npm .*not here: .*--onnxruntime-web"):
        fetch_onnxruntime_web()
