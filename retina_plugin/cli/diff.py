"""``retina diff A.yaml B.yaml``: which keys differ between two configs, with the paper's sections.

Both are resolved as ``retina train`` does it: defaults, ``_BASE_``, the file. ``OUTPUT_DIR``, which
follows the file's name, is left out.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from retina_plugin.config import flatten, section_of
from retina_plugin.engine import setup_cfg

__all__ = ["GROUPS", "OTHER", "compare", "group_of", "main", "report"]

# Group -> prefixes of its keys. The longest prefix wins: MODEL.RETINANET.OHEM is in the loss's
# group, the rest of MODEL in the model's. A key without a group is in OTHER.
GROUPS = {
    "model": ("MODEL",),
    "loss and assignment": (
        "MODEL.RETINANET.ALPHA_PER_CLASS",
        "MODEL.RETINANET.BBOX_REG",
        "MODEL.RETINANET.CLS_LOSS",
        "MODEL.RETINANET.FOCAL_",
        "MODEL.RETINANET.HINGE_",
        "MODEL.RETINANET.IGNORE_IOF_THRESH",
        "MODEL.RETINANET.IOU_",
        "MODEL.RETINANET.LOSS_",
        "MODEL.RETINANET.LOW_QUALITY_MATCHES",
        "MODEL.RETINANET.NORMALIZER",
        "MODEL.RETINANET.OHEM",
        "MODEL.RETINANET.SAMPLER",
        "MODEL.RETINANET.SMOOTH_L1_",
    ),
    "data and input": ("DATALOADER", "DATASETS", "INPUT", "MODEL.PIXEL_"),
    "schedule": ("SOLVER",),
    "test": (
        "MODEL.RETINANET.NMS_THRESH_TEST",
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
        "TEST",
    ),
}
OTHER = "other"

_LEFT_OUT = ("OUTPUT_DIR",)
_WIDTH = 36  # of a value's column; longer values are wrapped

# One line of the table: key, value in A, value in B, section of the paper.
Row = tuple[str, str, str, str]


def group_of(key: str) -> str:
    """The name in ``GROUPS`` that a key falls under, or ``OTHER``."""
    matching = [
        (prefix, group)
        for group, prefixes in GROUPS.items()
        for prefix in prefixes
        if key.startswith(prefix)
    ]
    return max(matching, key=lambda pair: len(pair[0]))[1] if matching else OTHER


def compare(a: CfgNode, b: CfgNode, all_keys: bool = False) -> dict[str, list[Row]]:
    """The rows of each group that has any.

    Args:
        all_keys: also keys with equal values. A list equals a tuple of the same values.
    """
    flat_a, flat_b = flatten(a), flatten(b)
    rows: dict[str, list[Row]] = {group: [] for group in (*GROUPS, OTHER)}
    for key in sorted((flat_a.keys() | flat_b.keys()) - set(_LEFT_OUT)):
        # A module of IMPORTS may add a key to one of the configs only.
        text_a = _text(flat_a[key]) if key in flat_a else ""
        text_b = _text(flat_b[key]) if key in flat_b else ""
        if all_keys or text_a != text_b:
            rows[group_of(key)].append((key, text_a, text_b, section_of(key)))
    return {group: found for group, found in rows.items() if found}


def _text(value: Any) -> str:
    """A value as it is printed. A list of lists, such as anchor sizes, has a line for each."""
    plain = _as_lists(value)
    if isinstance(plain, list) and plain and all(isinstance(v, list) for v in plain):
        return "\n".join(map(repr, plain))
    return repr(plain)


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def report(rows: dict[str, list[Row]]) -> str:
    """One table of all groups, each under a line with its name."""
    lines: list[Row] = []
    for group, found in rows.items():
        lines.append((f"[{group}]", "", "", ""))
        lines += [(key, _wrap(a), _wrap(b), section) for key, a, b, section in found]
    headers = ["key", "A", "B", "paper"]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.fill(line, _WIDTH) for line in text.split("\n"))


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Raises:
        ConfigError: a config that cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="retina diff",
        description="Show which keys of two configs differ, and the paper's section for each.",
    )
    parser.add_argument("a", metavar="A.yaml", help="a file or one of the paper's configs")
    parser.add_argument("b", metavar="B.yaml")
    parser.add_argument("--all", action="store_true", help="also show keys with equal values")
    args = parser.parse_args(argv)
    rows = compare(setup_cfg(args.a), setup_cfg(args.b), args.all)
    print(f"A: {args.a}\nB: {args.b}\n")
    print(report(rows) if rows else "no key differs")
