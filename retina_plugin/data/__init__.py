"""Datasets that the package brings; importing this registers them."""

from . import digits

digits.register()
