"""The exception for mistakes that the reader of the message can mend."""

__all__ = ["ConfigError"]


class ConfigError(ValueError):
    """A config, dataset or machine that can't work; one line that names the thing and the fix.

    ``train_net.py`` prints the line without a traceback.
    """
