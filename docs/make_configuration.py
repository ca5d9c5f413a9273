"""Write docs/configuration.md from retina_plugin/config.py: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from retina_plugin.cli.diff import GROUPS, OTHER, group_of
from retina_plugin.config import DETECTRON2_KEYS, KEYS, REMOVED_KEYS, Key

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

What can I set in YAML, what does it do, and which section of the paper describes it?

This page is generated from `retina_plugin/config.py` by `make docs`. Every key can stand in a YAML
file or as `KEY VALUE` at the end of a command. `retina diff A.yaml B.yaml` shows which keys differ
between two configs.

## How configs inherit

A YAML file names its `_BASE_` and holds only what differs. `_BASE_` is a file, seen from the folder
of the file that names it, or one of the paper's configs by its name:

```yaml
_BASE_: "retina_R50_600.yaml"
SOLVER:
  IMS_PER_BATCH: 8
  BASE_LR: 0.005
```

A list of bases is merged in order; later ones win. `OUTPUT_DIR` is `output/` and the file's name
unless you set it. `configs/_base_/retinanet.yaml` is the paper's detector and schedule.

Three fragments set the protocol around the loss (normaliser, box loss, low-quality matches, scales,
warm-up, biases, pixel mean, anchor offset), for images of 800 pixels: `_base_/protocol_paper.yaml`,
`_base_/protocol_detectron1.yaml` (the authors' first code) and `_base_/protocol_detectron2.yaml`
(Detectron2's own RetinaNet). They set the same keys, so one can replace another. Inherit one last:

```yaml
_BASE_: ["retina_R50_800.yaml", "_base_/protocol_detectron1.yaml"]
```

## Keys of the plugin

The defaults are Detectron2's behaviour. The model reads the keys of `MODEL.RETINANET`, whatever
trains it. `retina_plugin.engine.Trainer`, which `retina train` and `train_net.py` use, reads the
others.
"""

DETECTRON2 = """\
## Detectron2's keys that the paper describes

Name and meaning are Detectron2's; `configs/` sets the paper's values. All other keys of Detectron2
work as they do there.
"""

REMOVED = """\
## Keys that no longer exist

A config that sets one of them stops with an error that says the same.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for group in (*GROUPS, OTHER):
        keys = {name: key for name, key in KEYS.items() if group_of(name) == group}
        if keys:
            parts += [f"### {group.capitalize()}\n", entries(keys)]
    removed = "".join(f"- `{name}`: {what}.\n" for name, what in REMOVED_KEYS.items())
    return "\n".join([*parts, DETECTRON2, entries(DETECTRON2_KEYS), REMOVED, removed])


def entries(keys: dict[str, Key]) -> str:
    """Keys as a list."""
    return "".join(map(entry, keys, keys.values()))


def entry(name: str, key: Key) -> str:
    """A key as a line of a list."""
    facts = []
    if name in KEYS:
        facts.append(f"default `{key.default!r}`")
    if key.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in key.choices))
    if key.section:
        facts.append(f"paper: {key.section}")
    return f"- `{name}` ({'; '.join(facts)}): {key.meaning}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
