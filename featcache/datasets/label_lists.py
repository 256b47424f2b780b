"""Labels that are written as text: one class name, or a list of several. docs/datasets.md states the rule."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from featcache.errors import BadInput, shown

# In this order; None is white space.
SEPARATORS: dict[str, str | None] = {"semicolon": ";", "comma": ",", "bar": "|", "space": None}

# Names the position of an image in messages.
Where = Callable[[int], str]


def split_texts(values: Sequence[Any], rule: str, where: Where) -> tuple[Sequence[Any], str | None]:
    """Turn labels written as text into lists where they are lists; return (values, note).

    values: for each image text, or anything else, which stays what it is. rule: "label" (one class
    an image, unless the texts show otherwise), "labels" (several), "one" (a text is a class name,
    whatever it holds), or a word of SEPARATORS. where: function that names a position in messages.
    note: a phrase on what was decided, or None if there was nothing to decide.
    Raises BadInput for a text in brackets that is no list.
    """
    texts = {value.strip() for value in values if isinstance(value, str)} - {""}
    if rule == "one" or (rule == "label" and not texts):
        return values, None
    if any(map(_in_brackets, texts)):
        return [_as_list(value, partial(_read_list, where=where, n=n)) for n, value in enumerate(values)], "holds lists"
    word = rule if rule in SEPARATORS else _separator(texts, rule == "labels")
    if word is not None:
        lists = [_as_list(value, partial(_cut, word=word)) for value in values]
        # The column says so, or the documented default does.
        usual = word == rule or (rule, word) == ("labels", "semicolon")
        return lists, None if usual else f"is split at each {word}"
    kept = next((w for w in SEPARATORS if _is_cut(texts, w) and (w != "space" or _shrinks(texts, w))), None)
    note = kept and f"is not split at each {kept}, which would give {len(_pieces(texts, kept))} classes"
    return values if rule == "label" else [_as_list(value, lambda text: [text]) for value in values], note


def _as_list(value: Any, cut: Callable[[str], list[Any]]) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, str):
        return cut(value.strip()) if value.strip() else []
    return [] if value is None else [value]


def _in_brackets(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _read_list(text: str, where: Where, n: int) -> list[Any]:
    """Read a list as JSON writes it, or as Python does, which pandas puts into a CSV. Raises BadInput."""
    if not _in_brackets(text):
        return [text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        # numpy writes ['a' 'b'], which Python would read as ['ab'].
        if not re.search(r"""['"]\s+['"]""", text):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise BadInput(f'{where(n)}: {shown(text)} is no list as JSON or Python write it; write ["a", "b"]')


def _separator(texts: set[str], several: bool) -> str | None:
    """Return the word of the separator at which texts are lists, or None.

    Numbers with a separator between them are lists of indices. Lists of names have fewer different pieces than there
    are different texts, since their pieces come again in other lists; names of one class, such as "great white shark,
    white shark", have more.
    """
    for word in filter(lambda word: _is_cut(texts, word), SEPARATORS):
        if all(piece.removeprefix("-").isdecimal() for piece in _pieces(texts, word)):
            return word
        # Names of one class hold blanks too, so blanks need both reasons.
        enough = all if word == "space" else any
        if enough((several, _shrinks(texts, word))):
            return word
    return None


def _cut(text: str, word: str) -> list[str]:
    return [piece.strip() for piece in text.split(SEPARATORS[word]) if piece.strip()]


def _is_cut(texts: set[str], word: str) -> bool:
    return any(len(_cut(text, word)) > 1 for text in texts)


def _pieces(texts: set[str], word: str) -> set[str]:
    return {piece for text in texts for piece in _cut(text, word)}


def _shrinks(texts: set[str], word: str) -> bool:
    return len(_pieces(texts, word)) < len(texts)
