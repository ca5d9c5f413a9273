"""The paper's tables, trained and evaluated again: ``python -m reproduction.reproduce``."""
