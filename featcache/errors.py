"""The one exception for input that the user can mend."""

import difflib

import click


class BadInput(click.ClickException):
    """Bad input: one line that says what is wrong, where, and what to do. Exit code 2."""

    exit_code = 2


def nearest(word, known):
    """Return `"; did you mean 'x'?"` for the nearest of the known words, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
