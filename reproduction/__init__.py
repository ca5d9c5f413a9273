"""Train and evaluate the models of the paper's tables: ``python -m reproduction.reproduce``.

This folder is not installed. It needs a checkout, and uses the package as any user does.
"""

import retina_plugin  # noqa: F401  Before Detectron2: it hides the deprecations of Detectron2's imports.
