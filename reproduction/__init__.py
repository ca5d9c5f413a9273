"""The paper's tables, trained and evaluated again: ``python -m reproduction.reproduce``.

This folder is not installed. It needs a checkout, and uses the package as any user does.
"""
