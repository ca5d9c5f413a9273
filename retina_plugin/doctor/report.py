"""All checks in one report: ``retina doctor``."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from retina_plugin.errors import ConfigError

from .anchors import AnchorGrid
from .datasets import dataset_records
from .findings import Finding, Severity
from .flips import flip_findings
from .ground_truth import GroundTruth
from .image_size import size_findings
from .learning import (
    ClassCount,
    FirstLoss,
    StepCost,
    class_counts,
    class_findings,
    first_loss,
    loss_findings,
    positive_findings,
    step_findings,
)
from .matches import has_anchors
from .model import check_model
from .recall import AnchorFit, anchor_findings, anchor_fit
from .schedule import schedule_findings
from .suggest import AnchorSuggestion, suggest_anchors, suggestion_findings

__all__ = ["Check", "Report", "examine_training"]

Check = Callable[[], Iterable[Finding]]

_ORDER = list(Severity)
_VERSION = 1  # of the JSON


@dataclass
class Report:
    """What the checks found and measured.

    Args:
        config: the config file.
        overrides: ``KEY VALUE`` pairs of the command line.
        findings: (check, finding), in the order of the checks.
        seconds: check -> how long it took.
        The others are None if they could not be measured.

    Example:
        >>> report = Report("my.yaml")
        >>> report.run("boxes", lambda: [Finding(Severity.ERROR, "train.json", "has no boxes")])
        >>> report.count(Severity.ERROR)
        1
    """

    config: str
    overrides: tuple[str, ...] = ()
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    anchors: AnchorFit | None = None
    suggestion: AnchorSuggestion | None = None
    classes: tuple[ClassCount, ...] | None = None
    loss: FirstLoss | None = None
    step: StepCost | None = None
    _known: set[Finding] = field(default_factory=set, repr=False)

    def run(self, name: str, check: Check) -> None:
        """Run one check. If it raises, that is an error finding, and what it found before stays."""
        start = time.perf_counter()
        try:
            for finding in check():
                self._add(name, finding)
        except ConfigError as error:
            self._add(name, Finding(Severity.ERROR, name, str(error)))
        except Exception as error:
            # a mistake in a user's dataset function, or in the check: the others still run
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).strip().splitlines() or ["without a message"])[0]
            self._add(
                name,
                Finding(
                    Severity.ERROR,
                    name,
                    f"the check stopped with {type(error).__name__}: {text} ({frame.filename}, "
                    f"line {frame.lineno})",
                    "correct the code there if it is yours, else report it",
                ),
            )
        self.seconds[name] = time.perf_counter() - start

    def _add(self, name: str, finding: Finding) -> None:
        if finding not in self._known:  # every image may have one
            self._known.add(finding)
            self.findings.append((name, finding))

    def sorted_findings(self) -> list[tuple[str, Finding]]:
        """Errors first, then warnings, then notes."""
        return sorted(self.findings, key=lambda pair: _ORDER.index(pair[1].severity))

    def count(self, severity: Severity) -> int:
        """The number of findings that are this bad."""
        return sum(finding.severity is severity for _, finding in self.findings)

    def has_error(self, *keys: str) -> bool:
        """Whether an error is about a key that begins so, and not about weights or classes."""
        return any(
            finding.severity is Severity.ERROR
            and finding.where.startswith(keys)
            and finding.where not in ("MODEL.WEIGHTS", "MODEL.RETINANET.NUM_CLASSES")
            for _, finding in self.findings
        )

    def summary(self) -> str:
        """ "1 error, 2 warnings, 0 notes"."""
        counts = [(self.count(severity), severity.value) for severity in Severity]
        return ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        anchors = asdict(self.anchors) if self.anchors else None
        if anchors:
            sample = anchors["sample"]
            anchors["sample"] = {k: v for k, v in sample.items() if not k.endswith(("_N", "_NK"))}
        return {
            "version": _VERSION,
            "config": self.config,
            "overrides": list(self.overrides),
            "counts": {severity.value: self.count(severity) for severity in Severity},
            "findings": [{"check": n, **asdict(f)} for n, f in self.sorted_findings()],
            "checks": [{"name": name, "seconds": s} for name, s in self.seconds.items()],
            "anchors": anchors,
            "suggestion": {**asdict(self.suggestion), "yaml": self.suggestion.yaml()}
            if self.suggestion
            else None,
            "classes": [asdict(count) for count in self.classes] if self.classes else None,
            "first_loss": {**asdict(self.loss), "total": self.loss.total} if self.loss else None,
            "step": asdict(self.step) if self.step else None,
        }

    def to_json(self) -> str:
        """ASCII, so that any file system and reader will do."""
        return json.dumps(self.as_dict(), indent=2)


def examine_training(
    cfg: CfgNode,
    report: Report,
    time_step: Callable[[], StepCost] | None = None,
    *,
    processes: int = 1,
) -> None:
    """Add the checks of learning and of the anchors' fit to a report.

    Args:
        cfg: the config.
        report: gets findings and measurements.
        time_step: measures a training step; None: not measured.
        processes: that would train.
    """
    state: dict[str, Any] = {"images": 0}

    def read() -> Iterator[Finding]:
        records: list[Any] = []
        for name in cfg.DATASETS.TRAIN:
            try:
                loaded = dataset_records(name)
            except ConfigError:
                if report.count(Severity.ERROR):
                    return  # said already
                raise
            if not isinstance(loaded, list):  # it may also be a dataset of PyTorch
                yield Finding(
                    Severity.NOTE, name, "is no list of records: its boxes are not examined"
                )
                return
            records += loaded
        if not cfg.DATASETS.TRAIN:
            return  # said already
        state["gt"] = GroundTruth.from_records(records)
        if not len(state["gt"].boxes_G4) and not report.count(Severity.ERROR):
            yield Finding(
                Severity.ERROR,
                "DATASETS.TRAIN",
                f"has no box that training would see in {len(records):,} images; "
                f"{state['gt'].num_dropped:,} are crowds, without area, or outside of their image",
            )
        filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        state["images"] = sum(not filtered or _has_object(record) for record in records)
        state["names"] = _class_names(cfg)

    def classes() -> Iterator[Finding]:
        report.classes = class_counts(state["gt"], state["names"])
        yield from class_findings(report.classes)

    def anchors() -> Iterator[Finding]:
        state["grid"] = AnchorGrid.from_cfg(cfg)
        report.anchors = anchor_fit(cfg, state["grid"], state["gt"], state["names"])
        yield from anchor_findings(report.anchors)
        yield from positive_findings(report.anchors.sample)

    def sizes() -> Iterator[Finding]:
        assert report.anchors is not None
        yield from size_findings(cfg, state["grid"], state["gt"], report.anchors, state["names"])

    def suggestion() -> Iterator[Finding]:
        assert report.anchors is not None
        report.suggestion = suggest_anchors(cfg, state["grid"], state["gt"], report.anchors)
        if report.suggestion:
            yield from suggestion_findings(report.suggestion, report.anchors)

    def loss() -> Iterator[Finding]:
        assert report.anchors is not None
        report.loss = first_loss(cfg, report.anchors.sample, processes)
        if report.loss:
            yield from loss_findings(report.loss)

    def step() -> Iterator[Finding]:
        assert time_step is not None
        report.step = time_step()
        yield from step_findings(cfg, report.step)

    report.run("training set", read)
    if not report.has_error("SOLVER."):
        report.run("schedule", lambda: schedule_findings(cfg, state["images"]))
    if "names" in state:
        if MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") is not None:
            report.run("mirrored classes", lambda: flip_findings(cfg, state["names"]))
        report.run("classes", classes)
    of_model = ("MODEL", "INPUT.MIN_SIZE", "INPUT.MAX_SIZE")
    if not report.has_error(*of_model):
        report.run("model", lambda: check_model(cfg))
    buildable = not report.has_error(*of_model)  # otherwise it has no anchors
    if buildable and "names" in state and len(state["gt"].boxes_G4) and has_anchors(cfg):
        report.run("anchors", anchors)
        if report.anchors is not None:
            report.run("image size", sizes)
            report.run("other anchors", suggestion)
            report.run("first loss", loss)
    if time_step is not None and not report.count(Severity.ERROR):
        report.run("one step", step)


def _has_object(record: Any) -> bool:
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(annotations, (list, tuple)):
        return False
    return any(isinstance(a, dict) and not a.get("iscrowd", 0) for a in annotations)


def _class_names(cfg: CfgNode) -> list[str]:
    """Of the first training set; numbers where the dataset has no names."""
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if names is None:
        names = np.arange(cfg.MODEL.RETINANET.NUM_CLASSES)
    return [str(name) for name in names]
