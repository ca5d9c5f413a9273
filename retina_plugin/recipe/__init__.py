"""The config for a dataset and a machine, each value with its reason: ``retina init``.

:func:`decide` measures the training set and sets the keys in turn: what the model looks like
(``model.py``), then what fits the machine (``schedule.py``). What it decides is a :class:`Recipe`,
which writes itself as YAML. What is measured by a training is handed in from above.
"""

from .decide import Machine, decide
from .facts import Facts
from .settings import Recipe, Setting

__all__ = ["Facts", "Machine", "Recipe", "Setting", "decide"]
