"""Mistakes in a config, a dataset or an environment that the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "check_choice", "did_you_mean", "first_line", "one_line"]


class ConfigError(ValueError):
    """A config, dataset or machine that can't work: one line that names the thing and the fix.

    The commands print the line without a traceback. A name from a file may hold a line break, or
    characters that a terminal obeys: they are replaced.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` with a space for each line break and a "?" for what cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise a :class:`ConfigError` that lists the choices, if ``value`` is none of them.

    Args:
        key: what the user sets, e.g. "MODEL.RETINANET.NORMALIZER".
        value: what it is set to.
        choices: what it can be set to.
    """
    choices = list(choices)
    if value not in choices:
        raise ConfigError(
            f"{key}: unknown '{value}'{did_you_mean(value, choices)}; known: {', '.join(choices)}"
        )


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """ " (did you mean 'x' or 'y'?)" with the nearest choices, or "" if none is near."""
    near = difflib.get_close_matches(str(value), list(choices), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
