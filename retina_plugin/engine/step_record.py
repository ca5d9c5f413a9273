"""What is kept of a step that is not finite: the line for the user, and the file to repeat it."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError

__all__ = ["ProcessFacts", "StepRecord", "from_json", "to_json", "write_record"]

_FORMAT = 1
_MAX_NAMES = 8  # images in a line

# Words in a cause -> what to do about it.
_FIXES = {
    "the pixels": "repair these images, or remove them",
    "the ground-truth boxes": "correct the annotations of these images",
    "weights": "set a lower SOLVER.BASE_LR, and go on from a checkpoint before the weights grew",
    "": "set a lower SOLVER.BASE_LR, or SOLVER.CLIP_GRADIENTS.ENABLED True",
}


@dataclass
class ProcessFacts:
    """What one process knows of a step.

    Args:
        losses: name -> loss.
        images: {"file_name", "image_id"} of each record of its batch.
        samples: [position in the data, index in the dataset] of each record; empty if the loader
            does not know them.
        random_states: before the forward pass, see :func:`.state.random_state`.
        loader: the data loader's state, see ``ResumableLoader.state_dict``; empty if it has none.
        cause: the first thing that is not finite, e.g. "the logits of level p5"; "" if unknown.
        bad_images: file names of the images that it comes from.
        diagnosis: what :class:`~retina_plugin.engine.diagnosis.Diagnosis` holds; empty if the step
            was not run again.
    """

    losses: dict[str, float]
    images: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    random_states: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    cause: str = ""
    bad_images: list[str] = field(default_factory=list)
    diagnosis: dict[str, Any] = field(default_factory=dict)

    @property
    def has_bad_loss(self) -> bool:
        """The total loss of this process is not finite."""
        return not math.isfinite(sum(self.losses.values()))

    @property
    def was_repeated(self) -> bool:
        """The step was run again, and was not finite again."""
        return bool(self.diagnosis) and not self.diagnosis["is_finite"]


@dataclass
class StepRecord:
    """A step that is not finite, in all processes.

    The file is JSON: reading it runs no code.

        record = StepRecord.read("output/nonfinite_0000123.json")
        record.iteration, record.processes[0].images

    Args:
        iteration: counted from 0.
        processes: one entry for each process, by rank.
        skipped: steps that were skipped before it.
        last_checkpoint: the file name of the last checkpoint before it; "" if there was none.
        config: the training's config as YAML.
    """

    iteration: int
    processes: list[ProcessFacts]
    skipped: int = 0
    last_checkpoint: str = ""
    config: str = ""

    def describe(self) -> str:
        """What is not finite, where, and in which images: one line without an end."""
        guilty = [p for p in self.processes if p.has_bad_loss]
        guilty = guilty or [p for p in self.processes if p.was_repeated] or self.processes
        losses: dict[str, float] = {}
        for process in guilty:
            for name, value in process.losses.items():
                if not math.isfinite(value):
                    losses.setdefault(name, value)
        causes = list(dict.fromkeys(p.cause for p in guilty if p.cause))
        names = list(dict.fromkeys(name for p in guilty for name in p.bad_images if name))
        text = f"not finite at iteration={self.iteration} (counted from 0): "
        text += ", ".join(f"{k} {v}" for k, v in losses.items()) or "the losses are finite"
        if causes:
            text += f"; it begins in {', '.join(causes)}"
        if names:
            rest = len(names) - _MAX_NAMES
            text += f"; image{'s' if len(names) > 1 else ''} {', '.join(names[:_MAX_NAMES])}"
            text += f" and {rest} more" if rest > 0 else ""
        return text

    def fix(self) -> str:
        """What to do, in a few words."""
        causes = " ".join(p.cause for p in self.processes)
        return next(fix for words, fix in _FIXES.items() if words in causes)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``nonfinite_<iteration>.json`` and return its path."""
        path = Path(folder) / f"nonfinite_{self.iteration:07d}.json"
        content = {"format": _FORMAT, **asdict(self)}
        text = json.dumps(to_json(content), allow_nan=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StepRecord:
        """Read a file that :meth:`write` wrote.

        Raises:
            ConfigError: there is no such file, or it is another one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
        try:
            if content.pop("format") != _FORMAT:
                raise ValueError
            processes = content.pop("processes")
            record = cls(processes=[ProcessFacts(**p) for p in processes], **content)
            for process in record.processes:
                process.losses = {k: float(v) for k, v in process.losses.items()}
            if not isinstance(record.iteration, int) or not record.processes:
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path} is not a file nonfinite_<iteration>.json of this version"
            ) from None
        return record


def write_record(cfg: CfgNode, record: StepRecord) -> Path:
    """Add the training's config and its last checkpoint, and write the file into ``OUTPUT_DIR``."""
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    record.last_checkpoint = last.read_text(errors="replace").strip() if last.is_file() else ""
    record.config = cfg.dump()
    return record.write(cfg.OUTPUT_DIR)


def to_json(value: Any) -> Any:
    """A value of plain containers, numbers and tensors, as JSON can hold it.

    NaN is no JSON: a number that is not finite becomes text. A tensor becomes its bytes in base64.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Tensor):
        array = value.numpy()
        data = base64.b64encode(array.tobytes()).decode("ascii")
        return {"tensor": data, "dtype": str(array.dtype)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """The opposite of :func:`to_json`, for tensors with one axis."""
    if isinstance(value, Mapping):
        if value.keys() == {"tensor", "dtype"}:
            data = np.frombuffer(base64.b64decode(value["tensor"]), dtype=np.dtype(value["dtype"]))
            return torch.from_numpy(data.copy())
        return {k: from_json(v) for k, v in value.items()}
    return [from_json(v) for v in value] if isinstance(value, list) else value
