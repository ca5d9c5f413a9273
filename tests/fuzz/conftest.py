"""Says at the end of a run how many inputs were tried, and of what."""

import json
import time
from pathlib import Path

import hypothesis
import pytest

from tests.fuzz.counting import COUNTS

_STARTED = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-record", metavar="FILE", help="write the numbers of inputs tried to this JSON file"
    )


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its counts on."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = [[*key, n] for key, n in COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for part, test, number in getattr(node, "workeroutput", {}).get("fuzz", ()):
        COUNTS[part, test] += number


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not COUNTS:
        return
    parts = {}
    for (part, _), number in COUNTS.items():
        parts[part] = parts.get(part, 0) + number
    listed = ", ".join(f"{part} {number:,}" for part, number in sorted(parts.items()))
    terminalreporter.write_sep("-", "inputs tried by the fuzz tests")
    terminalreporter.write_line(f"{sum(parts.values()):,}: {listed}")
    path = config.getoption("--fuzz-record", None)
    if path and exitstatus == 0:
        record = {
            "profile": hypothesis.settings.get_current_profile_name(),
            "minutes": round((time.monotonic() - _STARTED) / 60, 1),
            "hypothesis": hypothesis.__version__,
            "inputs": dict(sorted(parts.items())),
        }
        Path(path).write_text(json.dumps(record, indent=2) + "\n")
