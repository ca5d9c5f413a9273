"""Converting the weights of other libraries, with the config that belongs to them."""

from .files import check_output, config_path, convert_file, convert_weights, write_converted
from .source import Converted, Source
from .sources import SOURCES, find_source

__all__ = [
    "SOURCES",
    "Converted",
    "Source",
    "check_output",
    "config_path",
    "convert_file",
    "convert_weights",
    "find_source",
    "write_converted",
]
