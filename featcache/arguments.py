"""What the arguments of the public functions may be. Anything else is one line, as on the command line."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, ParamSpec, TypeGuard, TypeVar

from featcache.errors import BadInput, shown
from featcache.names import unwritable

# No image has longer sides and no machine more workers: larger numbers are slips.
MOST_SIDE, MOST_WORKERS = 100_000, 1024

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Expected:
    """What an argument must be: in words for people, as a test of a value, and what to do about other values."""

    words: str
    fits: Callable[[object], bool]
    remedy: str = ""


def is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether a value can be the path of a file or folder."""
    return isinstance(value, str | os.PathLike) and not unwritable(os.fsdecode(value))


def is_module(value: object) -> bool:
    """Return whether a value is a torch.nn.Module. There is none unless something imported torch already."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def listed(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Return one path, or several, as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _are_numbers(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and all(isinstance(float(v), float) for v in value)
    except (TypeError, ValueError):
        return False


def whole(least: int | None = None, most: int = 2**63 - 1) -> Expected:
    """Expect a whole number from `least` to `most`, which by default is the largest that torch takes."""
    words = "a whole number" if least is None else f"a whole number of at least {least}"
    words += f" and at most {most}"
    low = -most if least is None else least

    def fits(value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= most

    return Expected(words, fits)


PATH = Expected("a path", is_path)
PATHS = Expected("a path or a list of paths", lambda value: is_path(value) or _is_list(value, is_path))
CHECKPOINT = Expected(
    "the path of a checkpoint",
    is_path,
    "; save the tensors of a network in memory with torch.save(network.state_dict(), 'network.pth') and give that path",
)
BACKBONE = Expected("the path of a checkpoint or a torch.nn.Module", lambda value: is_path(value) or is_module(value))
CHECKPOINTS = Expected("a list of paths of checkpoints", lambda value: _is_list(value, is_path))
NAME = Expected("a name", _is_name)
NAMES = Expected("a list of names", lambda value: _is_list(value, _is_name))
FLAG = Expected("True or False", lambda value: value is None or isinstance(value, bool))
NUMBERS = Expected("numbers", _are_numbers)


def takes(**expected: Expected) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that an argument which is not as expected raises BadInput.

    None is fine where it is the default, and for what the function takes as **named.

        @takes(run=PATH, seed=whole())
        def train(run, seed=0): ...
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = signature(function)
        rest = next((p.name for p in own.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            try:
                given = own.bind(*arguments, **named).arguments
            except TypeError:
                # There are too many, too few or unknown ones: Python says which.
                return function(*arguments, **named)
            given = given | given.get(rest, {})
            for name, wanted in expected.items():
                optional = name not in own.parameters or own.parameters[name].default is None
                left_out = name not in given or (given[name] is None and optional)
                if not left_out and not wanted.fits(given[name]):
                    raise BadInput(f"{name}: expected {wanted.words}, not {_named(given[name])}{wanted.remedy}")
            return function(*arguments, **named)

        return call

    return decorate


def _named(value: object) -> str:
    """Say a plain value in one line; of any other object, say its type."""
    if isinstance(value, str | os.PathLike) and (reason := unwritable(text := os.fsdecode(value))):
        return f"{shown(text)}, {reason}"
    return shown(value) if type(value).__module__ == "builtins" else f"a {type(value).__qualname__}"
