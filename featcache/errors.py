"""The one exception for input that the user can mend, and the rules that keep its message to one line."""

import difflib
import errno
import re
from collections.abc import Iterable
from reprlib import Repr

import click

_repr = Repr()
_repr.maxstring = _repr.maxother = 80
# With "Error: " before it, a line stays under 500 characters.
LONGEST_LINE = 490
# The words of a line that is too long are cut to the first of these lengths that makes it fit.
WORDS = (240, 120, 60, 40)
MOST_LINES = 20
MORE_SPACE = "free some space, and run the same command again"
REMEDIES = {
    errno.ENOSPC: MORE_SPACE,
    errno.EDQUOT: MORE_SPACE,
    errno.EFBIG: "raise the largest size of a file (ulimit -f), or choose another place",
    errno.EROFS: "choose a place that can be written to",
}


class BadInput(click.ClickException):
    """Bad input: one clear line that says what is wrong, where, and what to do. Exit code 2.

    lines: further lines below the first, where there are several things to say; see `one_line`.

        raise BadInput(f"--size {size}: must be at least 1")
    """

    exit_code = 2

    def __init__(self, message: str, *lines: str) -> None:
        more = len(lines) - MOST_LINES
        if more > 0:
            lines = (*lines[:MOST_LINES], f"... and {more} more")
        super().__init__("\n  ".join(map(one_line, (message, *lines))))


def of_the_system(error: OSError) -> str:
    """Return what the system says about an OSError, and what to do about it where that is known."""
    remedy = REMEDIES.get(error.errno) if error.errno is not None else None
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def nearest(word: object, known: Iterable[object]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of the known words, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Return repr(value), cut short: a value may be of any size, and a message about it must stay one line."""
    try:
        return _repr.repr(value)
    except ValueError:
        # Python does not write out numbers of more than 4,300 digits.
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """Return text in which whatever a terminal would act on, or cannot be encoded, is an escape such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return text as one printable line of at most LONGEST_LINE characters.

    Usually a path, an id or the name of a tensor makes it too long: long words lose their middle, and the line itself
    only if that is not enough. Its beginning says what is wrong, and its end what to do.
    """
    # Of text that is longer than this only the ends matter, and it may be of any length.
    text = f"{text[:10_000]} ... {text[-10_000:]}" if len(text) > 20_000 else text
    line = printable(re.sub(r"\s*[\n\r]\s*", " ", text.rstrip()))
    for most in WORDS:
        if len(line) <= LONGEST_LINE:
            return line
        line = " ".join(without_middle(word, most) for word in line.split(" "))
    if len(line) <= LONGEST_LINE:
        return line
    first, last = line[: 2 * LONGEST_LINE // 3 - 5], line[-LONGEST_LINE // 3 :]
    return f"{first.rpartition(' ')[0]} ... {last.partition(' ')[2]}"


def without_middle(word: str, most: int) -> str:
    """Return a word, cut to its beginning and its end if it has more than `most` characters."""
    return word if len(word) <= most else f"{word[: most // 2 - 2]}...{word[1 - most // 2 :]}"
