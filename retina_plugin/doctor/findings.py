"""What a check finds."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from retina_plugin.errors import ConfigError, one_line

__all__ = ["Finding", "Severity", "raise_errors"]

logger = logging.getLogger("retina_plugin")


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"  # training or its numbers would be wrong: nothing is started
    WARNING = "warning"  # probably a mistake
    NOTE = "note"  # worth knowing


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        severity: how bad it is.
        where: the config key, or the file, that it is about.
        what: what is the case, with the first example and how many there are.
        fix: what to do about it; "" if there is nothing to do.
    """

    severity: Severity
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}" + (f": {self.fix}" if self.fix else ""))


def raise_errors(findings: Iterable[Finding]) -> None:
    """Log warnings and notes; stop at errors.

    Raises:
        ConfigError: there is an error. The message is the first one, and how many follow.
    """
    errors = []
    for finding in findings:
        if finding.severity is Severity.ERROR:
            errors.append(finding)
        elif finding.severity is Severity.WARNING:
            logger.warning("%s", finding)
        else:
            logger.info("%s", finding)
    if errors:
        more = f" (and {len(errors) - 1} more: `retina doctor` lists them)" if errors[1:] else ""
        raise ConfigError(f"{errors[0]}{more}")
