"""``@fuzz(...)``: a hypothesis test whose inputs are counted."""

import collections
import functools
from pathlib import Path

from hypothesis import given, settings

# (part, test) -> inputs tried; the part is the test's file.
COUNTS: collections.Counter[tuple[str, str]] = collections.Counter()


def fuzz(times, **strategies):
    """Try ``times`` times the profile's number of inputs, see tests/conftest.py.

    Args:
        times: more for what is quick or has many kinds of inputs.
        strategies: of the test's arguments, as for hypothesis' ``given``.
    """

    def decorate(test):
        part = Path(test.__code__.co_filename).stem.removeprefix("test_")

        @settings(max_examples=times * settings.default.max_examples)
        @given(**strategies)
        @functools.wraps(test)
        def counted(*args, **kwargs):
            COUNTS[part, test.__name__] += 1
            return test(*args, **kwargs)

        return counted

    return decorate
