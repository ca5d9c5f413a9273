"""Train and evaluate the models of the paper's tables: ``python -m reproduction.reproduce``.

This folder is not installed. It needs a checkout, and uses the package as any user does.
"""
