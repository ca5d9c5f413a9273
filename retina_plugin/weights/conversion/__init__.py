"""Converting the weights of other libraries, with the config that belongs to them."""

from .source import Converted, Source

__all__ = ["Converted", "Source"]
