"""Checks of a config, its datasets, its weights and the machine, before anything is built."""

from .findings import Finding, Severity, raise_errors

__all__ = ["Finding", "Severity", "raise_errors"]
