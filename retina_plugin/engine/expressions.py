"""Arithmetic in config files, without Python's ``eval``.

Detectron2's own RetinaNet config computes its anchor sizes with the YAML tag
``!!python/object/apply:eval`` from a text, which could be any program. Here such a text may hold
numbers, ``+ - * / **``, lists, tuples and comprehensions over lists.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["evaluate"]

_MAX_CHARACTERS = 500
_MAX_STEPS = 10_000  # parts that are evaluated, counted again in each round of a comprehension
_MAX_NUMBER = 1e9
_MAX_EXPONENT = 64

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(text: str) -> Any:
    """The numbers, lists and tuples that a text describes; what ``eval`` would give.

        evaluate("[[x, x * 2 ** 0.5] for x in [32, 64]]")

    Raises:
        ValueError: the text is longer than 500 characters, is something else than arithmetic with
            lists, takes too many steps, describes too many values, or has numbers
            beyond 1e9. It says which.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it is longer than {_MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(text.lstrip(" \t"), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("it is no expression") from None
    value = _Evaluation().value(tree.body, {})
    if _count_values(value, {}) > _MAX_STEPS:
        raise ValueError(f"it describes more than {_MAX_STEPS} values")
    return value


def _count_values(value: Any, done: dict[int, int]) -> int:
    """How many values there are when lists that stand there several times are written out."""
    if not isinstance(value, (list, tuple)):
        return 1
    if id(value) not in done:
        done[id(value)] = 1 + sum(_count_values(item, done) for item in value)
    return done[id(value)]


class _Evaluation:
    def __init__(self) -> None:
        self._steps = 0

    def value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ValueError(f"it takes more than {_MAX_STEPS} steps")
        if isinstance(node, ast.Constant):
            return _bounded(_number(node.value))
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self.value(item, names) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.ListComp):
            return self._rounds(node.elt, node.generators, names)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            operand = _number(self.value(node.operand, names))
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left = _number(self.value(node.left, names))
            right = _number(self.value(node.right, names))
            return _calculate(type(node.op), left, right)
        raise ValueError(
            "it may hold numbers, + - * / **, lists and comprehensions over lists, but not "
            f"'{ast.unparse(node)[:80]}'"
        )

    def _rounds(
        self, element: ast.expr, generators: list[ast.comprehension], names: Mapping[str, Any]
    ) -> list[Any]:
        if not generators:
            return [self.value(element, names)]
        first, *others = generators
        if first.ifs or first.is_async or not isinstance(first.target, ast.Name):
            raise ValueError("a comprehension may only be '... for NAME in LIST'")
        items = self.value(first.iter, names)
        if not isinstance(items, (list, tuple)):
            raise ValueError("a comprehension may only go over a list")
        results = []
        for item in items:
            results += self._rounds(element, others, {**names, first.target.id: item})
        return results


def _calculate(kind: type[ast.operator], left: float, right: float) -> float:
    if kind is ast.Pow and abs(right) > _MAX_EXPONENT:
        raise ValueError(f"its exponents may be at most {_MAX_EXPONENT}, not {right}")
    try:
        result = _OPERATORS[kind](left, right)
    except ArithmeticError as error:  # 1 / 0; a power that is no float
        raise ValueError(str(error)) from None
    if isinstance(result, complex):
        raise ValueError(f"{left} ** {right} is no real number")
    return _bounded(result)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"it has {str(value)[:80]!r} where a number should be")
    return value


def _bounded(value: float) -> float:
    if not math.isfinite(value) or abs(value) > _MAX_NUMBER:
        raise ValueError(f"it has numbers beyond {_MAX_NUMBER:g}")
    return value
