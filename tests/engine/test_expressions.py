"""Arithmetic in config files: Python's values for what is allowed, an error for the rest."""

import pytest

from retina_plugin.engine.expressions import evaluate

ANCHORS = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


@pytest.mark.parametrize(
    "text",
    [
        ANCHORS,
        " 3",
        "-2 ** 2 + +1",
        "7 / 2 - .5 * 3",
        "(1, [2, (3,)], [])",
        "[[x, y] for x in [1, 2] for y in [x, x * 10]]",
        "[[x * y for y in (1, 2)] for x in [1.5]]",
    ],
)
def test_value_is_pythons(text):
    """Exactly, and of the same types."""
    value, expected = evaluate(text), eval(text.lstrip())
    assert value == expected and repr(value) == repr(expected)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch ran')",
        "open('ran', 'w')",
        "(1).__class__",
        "[].append",
        "[x for x in [1]].append(1)",
        "print",
        "x",
        "[y for x in [1]]",
        "lambda: 1",
        "[(x := 3)]",
        "{1: 2}",
        "{1}",
        "{x for x in [1]}",
        "(x for x in [1])",
        "[*[1]]",
        "[1][0]",
        "f'{1}'",
        "'a'",
        "b'a'",
        "True",
        "None",
        "...",
        "1j",
        "(-1) ** .5",
        "1 if 1 else 2",
        "1 < 2",
        "not 1",
        "~1",
        "7 // 2",
        "7 % 2",
        "1 << 30",
        "1 @ 2",
        "[1] + [2]",
        "[0] * 3",
        "'a' * 3",
        "-[1]",
        "[x for x in 3]",
        "[x for x in [1] if x]",
        "[x for x, y in [[1, 2]]]",
        "",
        "(",
        "1 +",
        "1; 2",
        "import os",
        "a\0b",
    ],
)
def test_anything_else_raises(text, tmp_path, monkeypatch):
    """And is not run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        evaluate(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9",
        "2 ** 65",
        "2 ** -65",
        "1e5 * 1e5",
        "1e309",
        "1 / 0",
        "0 ** -1",
        "[" * 101 + "]" * 101,
        "-" * 400 + "1",
        "1" * 501,
        "[[x, x] for x in " * 18 + "[1]" + "]" * 18,  # half a million values
        "[0 " + "for x in [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] " * 8 + "]",
    ],
)
def test_sizes_are_bounded(text):
    """Of numbers, exponents, texts, and the number of steps and of values."""
    if text.startswith("[[[") or text.startswith("-"):
        evaluate(text)  # deep, but small
        return
    with pytest.raises(ValueError):
        evaluate(text)
