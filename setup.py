"""The metadata is in pyproject.toml. This file is for tools that still look for setup.py."""

from setuptools import setup

setup()
