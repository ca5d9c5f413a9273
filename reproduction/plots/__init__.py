"""The paper's figures: the command is ``reproduction/figures.py``."""
