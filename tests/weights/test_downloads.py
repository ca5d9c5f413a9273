"""Downloaded weights: once, and again when the file in the cache is damaged."""

import functools
import http.server
import io
import os
import pickle
import threading
import uuid
from pathlib import Path

import pytest
import torch

from retina_plugin.weights.downloads import download, split_query


def pickled():
    return pickle.dumps({"model": {"a.weight": list(range(1000))}}, protocol=4)


def zipped():
    stream = io.BytesIO()
    torch.save({"model": {"a.weight": torch.arange(1000)}}, stream)
    return stream.getvalue()


def old_format():
    stream = io.BytesIO()
    tensor = torch.arange(1000)
    torch.save({"a.weight": tensor}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def safetensors_like_a_pickle():
    """Its header has 128 bytes, which is how a pickle begins."""
    header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    return (128).to_bytes(8, "little") + header.ljust(128) + b"ab"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Keeps the paths that were asked for, in ``requests``."""

    def log_message(self, *args):
        self.requests.append(self.path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(content): a URL that gives it, and the list of requests."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    Handler.requests = []
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def put(content):
            name = f"{uuid.uuid4().hex}.pkl"  # the process remembers the URLs that it has seen
            (tmp_path / "served" / name).write_bytes(content)
            return f"http://127.0.0.1:{server.server_port}/{name}", Handler.requests

        yield put
        server.shutdown()


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "without its last byte": lambda content: content[:-1],
    "flipped": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("content", [pickled(), zipped()], ids=["pkl", "pth"])
def test_damaged_file_is_downloaded_again(served, log, content, damage):
    url, requests = served(content)
    local = download(url)
    assert Path(local).read_bytes() == content and len(requests) == 1
    assert download(url) == local and len(requests) == 1
    Path(local).write_bytes(DAMAGES[damage](content))
    assert Path(download(url)).read_bytes() == content and len(requests) == 2
    assert f"{local} is damaged: downloading it again" in log.text
    download(url)
    assert len(requests) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "without its last byte"])
@pytest.mark.parametrize("content", [pickled(), zipped()], ids=["pkl", "pth"])
def test_damaged_file_without_a_fingerprint_is_downloaded_again(served, content, damage):
    """Detectron2 has put it there: a flipped bit cannot be seen, a missing end can."""
    url, requests = served(content)
    local = download(url)
    os.remove(f"{local}.fingerprint")
    Path(local).write_bytes(DAMAGES[damage](content))
    assert Path(download(url)).read_bytes() == content and len(requests) == 2


@pytest.mark.parametrize("content", [old_format(), safetensors_like_a_pickle()])
def test_other_formats_are_not_damaged(served, log, content):
    """Neither ends as a pickle does."""
    url, requests = served(content)
    assert Path(download(url)).read_bytes() == content and len(requests) == 1
    assert "damaged" not in log.text


def test_file_of_the_user_is_left_alone(tmp_path):
    """It is not in the cache: nothing is written beside it."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    assert download(str(path)) == str(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "file", "query"),
    [
        ("detectron2://a/b.pkl?matching_heuristics=True", "detectron2://a/b.pkl", True),
        ("https://a/b.pkl?matching_heuristics=True", "https://a/b.pkl", True),
        ("digits://a.pth", "digits://a.pth", False),
        ("no.pth?matching_heuristics=True", "no.pth", True),
        ("/no?/no.pth", "/no?/no.pth", False),
        ("/no?/no.pth?matching_heuristics=True", "/no?/no.pth", True),
        ("", "", False),
    ],
)
def test_what_stands_after_the_path(path, file, query):
    assert split_query(path) == (file, "matching_heuristics=True" if query else "")
