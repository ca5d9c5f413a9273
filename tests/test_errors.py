"""Messages."""

import pickle

from retina_plugin.doctor import Finding, Severity
from retina_plugin.errors import ConfigError


def test_message_is_one_line_that_can_be_printed():
    """Whatever names from a file it has; also after a pickle, from another process."""
    text = "a\nb\r\nc\x1b[31m\0\ud800 é 中"
    expected = "a b c?[31m?? é 中"
    assert str(ConfigError(text)) == expected
    assert str(pickle.loads(pickle.dumps(ConfigError(text)))) == expected
    assert str(Finding(Severity.ERROR, "file", text)) == f"file: {expected}"
    assert expected.encode()
