"""The one exception for input that the user can mend."""

import difflib
from reprlib import Repr

import click

_repr = Repr()
_repr.maxstring = _repr.maxother = 80


class BadInput(click.ClickException):
    """Bad input: one line that says what is wrong, where, and what to do. Exit code 2."""

    exit_code = 2


def nearest(word, known):
    """Return `"; did you mean 'x'?"` for the nearest of the known words, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value):
    """repr(value), cut short: input may be of any size, and what is wrong with it is to stay one line."""
    return _repr.repr(value)
