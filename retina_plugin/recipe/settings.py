"""Decided keys with their reasons, and the YAML file that they make."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode

from retina_plugin.config import flatten
from retina_plugin.errors import one_line

__all__ = ["Recipe", "Setting"]

_COLUMNS = 100


@dataclass(frozen=True)
class Setting:
    """A key, its value and why it has it."""

    key: str
    value: Any
    reason: str


@dataclass
class Recipe:
    """A config on the way from its base to what ``retina init`` writes.

    Args:
        base: what the file names as ``_BASE_``.
        cfg: the base's values, with those that the user gave. Decisions are merged into it.
        given: keys that the user gave: no decision changes them.
        base_solver: ``SOLVER`` of the base, without what the user gave; None: ``cfg.SOLVER``.
        title: lines of the comment at the head of the file.
        warnings: what the user has to know before the training.
        settings: the decisions.

    Example:
        >>> recipe = Recipe("retina_R50_600.yaml", setup_cfg("retina_R50_600.yaml"))
        >>> recipe.set("SOLVER.MAX_ITER", 3000, "24 epochs of 2,000 images")
        >>> recipe.cfg.SOLVER.MAX_ITER
        3000
    """

    base: str
    cfg: CfgNode
    given: frozenset[str] = frozenset()
    base_solver: CfgNode | None = None
    title: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Setting] = field(default_factory=dict)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Decide a key. One that the user gave keeps its value."""
        if key in self.given:
            value, reason = self.value(key), "given to `retina init`"
        else:
            self.cfg.merge_from_list([key, value])
            value = self.value(key)  # with the type that the key has
        self.settings[key] = Setting(key, value, reason)

    def value(self, key: str) -> Any:
        """The value of a full key, e.g. "SOLVER.MAX_ITER"."""
        return flatten(self.cfg)[key]

    def warn(self, text: str) -> None:
        """Say a thing on the console and at the head of the file."""
        self.warnings.append(one_line(text))

    def yaml(self) -> str:
        """The file: a comment above each key says why it has its value."""
        for key in sorted(self.given - self.settings.keys()):
            self.set(key, None, "")
        head = [line for text in self.title for line in _comment(text, "")]
        head += [line for text in self.warnings for line in _comment(f"Warning: {text}", "")]
        lines = [*head, f"_BASE_: {json.dumps(self.base, ensure_ascii=False)}"]
        tree: dict[str, Any] = {}
        for setting in self.settings.values():
            *path, leaf = setting.key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = setting
        return "\n".join([*lines, *_lines(tree, "")]) + "\n"


def _lines(tree: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, content in tree.items():
        if isinstance(content, Setting):
            lines += [*_comment(content.reason, indent), *_assignment(name, content.value, indent)]
        else:
            lines += [f"{indent}{name}:", *_lines(content, f"{indent}  ")]
    return lines


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    text = one_line(text)
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=prefix, subsequent_indent=prefix,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _assignment(name: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        rows = [f"{indent}  - {_scalar(list(row))}" for row in value]
        return [f"{indent}{name}:", *rows]
    return [f"{indent}{name}: {_scalar(value)}"]


def _scalar(value: Any) -> str:
    """YAML that is JSON: strings in quotes, so that nothing in a file's name means anything."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
