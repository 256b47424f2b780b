"""What the commands' Python twins may be given. Anything else is one line, as on the command line."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from numbers import Integral

from featcache.errors import BadInput, shown
from featcache.names import unwritable

# Beyond these are no sizes of images, and no machines, but slips.
MOST_SIDE, MOST_WORKERS = 100_000, 1024


@dataclass(frozen=True)
class Kind:
    """A kind of argument: its name for people, whether a value is of it, and what to do about another value."""

    words: str
    fits: Callable[[object], bool]
    remedy: str = ""


def is_path(value):
    """Whether a value can be the path of something."""
    return isinstance(value, str | os.PathLike) and not unwritable(os.fsdecode(value))


def listed(paths):
    """One path, or several, as a list."""
    return [paths] if is_path(paths) else list(paths)


def _is_name(value):
    return isinstance(value, str)


def _is_list(value, fits):
    return isinstance(value, list | tuple) and all(map(fits, value))


def _are_numbers(value):
    try:
        return not isinstance(value, str | bytes) and all(isinstance(float(v), float) for v in value)
    except (TypeError, ValueError):
        return False


def whole(least=None, most=2**63 - 1):
    """The kind of whole numbers, from `least` to `most`, which by default is the largest that torch takes."""
    words = "a whole number" if least is None else f"a whole number of at least {least}"
    words += f" and at most {most}"

    def fits(value):
        low = -most if least is None else least
        return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= most

    return Kind(words, fits)


PATH = Kind("a path", is_path)
PATHS = Kind("a path or a list of paths", lambda value: is_path(value) or _is_list(value, is_path))
CHECKPOINT = Kind(
    "the path of a checkpoint",
    is_path,
    "; save the tensors of a network in memory with torch.save(network.state_dict(), 'network.pth') and give that path",
)
NAME = Kind("a name", _is_name)
NAMES = Kind("a list of names", lambda value: _is_list(value, _is_name))
FLAG = Kind("True or False", lambda value: value is None or isinstance(value, bool))
NUMBERS = Kind("numbers", _are_numbers)


def takes(**kinds):
    """Decorate a function so that arguments of another kind raise BadInput; None is fine where it is the default."""

    def decorate(function):
        expected = signature(function)

        @wraps(function)
        def call(*arguments, **named):
            try:
                given = expected.bind(*arguments, **named).arguments
            except TypeError:
                # Too many, too few or unknown ones: Python says which.
                return function(*arguments, **named)
            for name, kind in kinds.items():
                left_out = name not in given or (given[name] is None and expected.parameters[name].default is None)
                if not left_out and not kind.fits(given[name]):
                    raise BadInput(f"{name}: expected {kind.words}, not {_named(given[name])}{kind.remedy}")
            return function(*arguments, **named)

        return call

    return decorate


def _named(value):
    """A plain value for people in one line; of any other object its type."""
    if isinstance(value, str | os.PathLike) and (reason := unwritable(text := os.fsdecode(value))):
        return f"{shown(text)}, {reason}"
    return shown(value) if type(value).__module__ == "builtins" else f"a {type(value).__qualname__}"
