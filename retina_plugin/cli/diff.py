"""``retina diff A.yaml B.yaml``: which keys differ between two configs.

Both are resolved as ``train_net.py`` does (defaults, ``_BASE_``, the file). ``OUTPUT_DIR``, which
follows the file's name, is no knob.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from retina_plugin import config
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError

__all__ = ["GROUPS", "compare", "flatten", "group_of", "main", "report"]

# Group -> beginnings of its keys. The longest beginning wins: MODEL.RETINANET.OHEM is the loss's,
# the rest of MODEL the model's. What has none is in REST.
GROUPS = {
    "model": ("MODEL",),
    "loss and assignment": (
        "MODEL.RETINANET.ALPHA_PER_CLASS",
        "MODEL.RETINANET.BBOX_REG",
        "MODEL.RETINANET.CLS_LOSS",
        "MODEL.RETINANET.FOCAL_",
        "MODEL.RETINANET.HINGE_",
        "MODEL.RETINANET.IOU_",
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
REST = "rest"

_NOT_KNOBS = ("OUTPUT_DIR",)
_WIDTH = 36  # of a value; a longer one takes several lines


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Full key -> value of every knob."""
    return {key: value for key, value in config.flatten(cfg).items() if key not in _NOT_KNOBS}


def group_of(key: str) -> str:
    """The name in ``GROUPS`` that a key falls under, or ``REST``."""
    found = [(start, group) for group, starts in GROUPS.items() for start in starts]
    found = [(start, group) for start, group in found if key.startswith(start)]
    return max(found, key=lambda pair: len(pair[0]))[1] if found else REST


def compare(a: CfgNode, b: CfgNode, all_knobs: bool = False) -> dict[str, list[tuple[str, ...]]]:
    """Group -> rows of (key, value in ``a``, value in ``b``, section of the paper).

    Args:
        all_knobs: also those that are equal. A list and a tuple of the same values are.
    """
    knobs_a, knobs_b = flatten(a), flatten(b)
    rows: dict[str, list[tuple[str, ...]]] = {group: [] for group in (*GROUPS, REST)}
    for key in sorted(knobs_a.keys() | knobs_b.keys()):
        # a module of IMPORTS may add a key to one of them
        text_a, text_b = (_text(k[key]) if key in k else "" for k in (knobs_a, knobs_b))
        if all_knobs or text_a != text_b:
            rows[group_of(key)].append((key, text_a, text_b, config.section_of(key)))
    return {group: found for group, found in rows.items() if found}


def _text(value: Any) -> str:
    """A value as it is printed; a list of lists (sizes of anchors) has a line for each."""
    plain = _lists(value)
    if isinstance(plain, list) and plain and all(isinstance(v, list) for v in plain):
        return "\n".join(map(repr, plain))
    return repr(plain)


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def report(rows: dict[str, list[tuple[str, ...]]]) -> str:
    """One table of all groups, with a line for the name of each."""
    lines: list[tuple[str, ...]] = []
    for group, found in rows.items():
        lines.append((f"[{group}]", "", "", ""))
        lines += [(key, _wrap(a), _wrap(b), section) for key, a, b, section in found]
    headers = ["key", "A", "B", "paper"]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.fill(line, _WIDTH) for line in text.split("\n"))


def main(argv: list[str] | None = None) -> None:
    """The command; exits with 1 and one line where a file can't be read."""
    parser = argparse.ArgumentParser(
        prog="retina diff",
        description="Which knobs differ between two configs, and where the paper speaks of them.",
    )
    parser.add_argument("a", metavar="A.yaml")
    parser.add_argument("b", metavar="B.yaml")
    parser.add_argument("--all", action="store_true", help="also the knobs that are equal")
    args = parser.parse_args(argv)
    try:
        rows = compare(setup_cfg(args.a), setup_cfg(args.b), args.all)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"A: {args.a}\nB: {args.b}\n")
    print(report(rows) if rows else "no knob differs")
