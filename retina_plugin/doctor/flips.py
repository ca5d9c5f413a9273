"""Whether ``INPUT.RANDOM_FLIP`` makes one class look like another, as far as names tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from .findings import Finding, Severity

__all__ = ["flip_findings"]

# Words that a mirror swaps, for each of Detectron2's flips.
_SWAPPED = {
    "horizontal": (
        ("left", "right"),
        ("l", "r"),
        ("lh", "rh"),
        ("lhs", "rhs"),
        ("leftward", "rightward"),
        ("leftwards", "rightwards"),
        ("clockwise", "counterclockwise"),
        ("clockwise", "anticlockwise"),
        ("cw", "ccw"),
        ("east", "west"),
        ("port", "starboard"),
        ("sinistral", "dextral"),
        ("links", "rechts"),  # German and Dutch
        ("gauche", "droite"),  # French
        ("izquierda", "derecha"),  # Spanish
        ("izquierdo", "derecho"),
        ("sinistra", "destra"),  # Italian
        ("esquerda", "direita"),  # Portuguese
        ("左", "右"),  # Chinese and Japanese
    ),
    "vertical": (
        ("up", "down"),
        ("upward", "downward"),
        ("upwards", "downwards"),
        ("top", "bottom"),
        ("upper", "lower"),
        ("above", "below"),
        ("north", "south"),
        ("clockwise", "counterclockwise"),
        ("clockwise", "anticlockwise"),
        ("cw", "ccw"),
        ("上", "下"),
    ),
}
# Words that need no partner among the classes: a mirrored object of the class is another thing.
_ALONE = {"horizontal": {"left", "right"}, "vertical": {"up", "down"}}
_ARROWS = {"arrow", "arrows", "chevron", "uturn"}
_DIGIT_WORDS = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
}  # fmt: skip
_TEXT = {
    "barcode", "caption", "char", "character", "characters", "digit", "digits", "glyph", "glyphs",
    "handwriting", "letter", "letters", "licence", "license", "logo", "number", "numberplate",
    "numbers", "numeral", "numerals", "ocr", "speed", "text", "word", "words",
}  # fmt: skip
_FEW = 3  # letters, or digits as words: as many make an alphabet

_EXAMPLES = 4


def flip_findings(cfg: CfgNode, class_names: Sequence[str]) -> Iterator[Finding]:
    """Classes whose names say that a mirrored object belongs to another class, or to none.

    Args:
        cfg: its ``INPUT.RANDOM_FLIP``.
        class_names: of the training set.
    """
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in _SWAPPED:
        return
    tokens = {name: _tokens(name) for name in map(str, class_names)}
    reasons = [
        ("are each other's mirror image", _mirrored_pairs(tokens, _SWAPPED[flip])),
        ("name a direction", _containing(tokens, _ALONE[flip] | _ARROWS)),
        ("are digits", _digits(tokens)),
        ("are letters", _letters(tokens)),
    ]
    named: set[str] = set()
    for what, names in reasons:
        new = [name for name in names if not set(name.split(" / ")) <= named]
        if new:
            named.update(part for name in new for part in name.split(" / "))
            yield _finding(Severity.WARNING, flip, f"{_listed(new)} {what}")
    text = [name for name in _containing(tokens, _TEXT) if name not in named]
    if text:
        yield _finding(Severity.NOTE, flip, f"{_listed(text)} may hold text, which no mirror keeps")


def _finding(severity: Severity, flip: str, what: str) -> Finding:
    return Finding(
        severity,
        "INPUT.RANDOM_FLIP",
        f"{flip} mirrors half of the images, but the classes {what}",
        'set INPUT.RANDOM_FLIP "none"',
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _EXAMPLES} more" if names[_EXAMPLES:] else ""
    return ", ".join(f"'{name}'" for name in names[:_EXAMPLES]) + more


def _tokens(name: str) -> tuple[str, ...]:
    """ "turnLeft_2" -> ("turn", "left", "2")."""
    spaced = re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+|\d+", spaced.casefold())
    parts: list[str] = []
    for word in words:
        # "leftarrow", "arrowleft"; and characters of scripts without spaces
        match = re.fullmatch(r"(left|right|up|down)(arrow|hand|turn|side|ward)s?", word)
        if match:
            parts += match.groups()
        elif re.search(r"[左右上下]", word):
            parts += [part for part in re.split(r"([左右上下])", word) if part]
        else:
            parts.append(word)
    return tuple(parts)


def _mirrored_pairs(
    tokens: dict[str, tuple[str, ...]], swapped: Sequence[tuple[str, str]]
) -> list[str]:
    """ "a / b" for classes whose names differ in one swapped word only."""
    names = {words: name for name, words in tokens.items()}
    pairs = []
    for words, name in names.items():
        for i, word in enumerate(words):
            for first, second in swapped:
                other = names.get((*words[:i], second, *words[i + 1 :]))
                if word == first and other is not None:
                    pairs.append(f"{name} / {other}")
    return pairs


def _containing(tokens: dict[str, tuple[str, ...]], words: set[str]) -> list[str]:
    return [name for name, own in tokens.items() if words & set(own)]


def _digits(tokens: dict[str, tuple[str, ...]]) -> list[str]:
    numbers = [name for name, own in tokens.items() if own and all(w.isdigit() for w in own)]
    words = [name for name, own in tokens.items() if len(own) == 1 and own[0] in _DIGIT_WORDS]
    return numbers + (words if len(words) >= _FEW else [])


def _letters(tokens: dict[str, tuple[str, ...]]) -> list[str]:
    letters = [
        name for name, own in tokens.items() if own and len(own[-1]) == 1 and own[-1].isalpha()
    ]
    # "A", "B", "C", or "letter A": the names have nothing else that differs
    stems = {tokens[name][:-1] for name in letters}
    return letters if len(letters) >= _FEW and len(stems) == 1 else []
