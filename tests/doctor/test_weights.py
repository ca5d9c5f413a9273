"""Weights are there, and the full check reads them."""

import math

import pytest
import torch

from retina_plugin.doctor import Severity, check_weights


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>not found</html>", "a web page"),
        ({"model": {"w": torch.tensor([1.0, math.nan])}}, "finite"),
        ({"model": {"w": torch.ones(2)}}, None),
    ],
    ids=["web page", "NaN", "sound"],
)
def test_weights_are_read_where_asked(tiny_cfg, tmp_path, content, says):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    tiny_cfg.MODEL.WEIGHTS = str(path)
    assert list(check_weights(tiny_cfg)) == []
    found = list(check_weights(tiny_cfg, read=True))
    assert bool(found) == (says is not None)
    for finding in found:
        assert finding.severity is Severity.ERROR and finding.where == "MODEL.WEIGHTS"
        assert str(path) in finding.what and says in finding.what


@pytest.mark.parametrize("name", ["model.pth?download=true", "Run:1.pth", "what?/model.pth"])
def test_file_of_any_name_is_there(tiny_cfg, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tiny_cfg.MODEL.WEIGHTS = name
    (missing,) = check_weights(tiny_cfg)
    assert missing.what.startswith("no file ")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save({"model": {"w": torch.ones(2)}}, name)
    for query in ("", "?matching_heuristics=True"):
        tiny_cfg.MODEL.WEIGHTS = name + query
        assert list(check_weights(tiny_cfg, read=True)) == []
