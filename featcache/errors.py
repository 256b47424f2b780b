"""The one exception for input that the user can mend, and how what it says stays a line."""

import difflib
import errno
import re
from reprlib import Repr

import click

_repr = Repr()
_repr.maxstring = _repr.maxother = 80
# With "Error: " before it, a line stays under 500 characters.
LONGEST_LINE = 490
# Words of a line that is too long are cut to the first of these lengths with which it fits.
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

    lines: where there are several things to say, one line each below the first; see `one_line`.
    """

    exit_code = 2

    def __init__(self, message, *lines):
        more = len(lines) - MOST_LINES
        if more > 0:
            lines = (*lines[:MOST_LINES], f"... and {more} more")
        super().__init__("\n  ".join(map(one_line, (message, *lines))))


def of_the_system(error):
    """What the system says of an OSError, and what to do about it where that is known."""
    remedy = REMEDIES.get(error.errno)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def nearest(word, known):
    """Return `"; did you mean 'x'?"` for the nearest of the known words, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value):
    """repr(value), cut short: input may be of any size, and what is wrong with it is to stay one line."""
    try:
        return _repr.repr(value)
    except ValueError:
        # Python writes out no numbers of more than 4,300 digits.
        return "a number of thousands of digits"


def printable(text):
    """Text with all that a terminal would act on, or that cannot be encoded, as an escape such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text):
    """Text as one printable line of at most LONGEST_LINE characters.

    What makes it too long is mostly a path, an id or the name of a tensor: long words lose their middle, and
    only where that is not enough the line does. Its beginning says what is wrong, and its end what to do.
    """
    # Beyond this length only the ends matter, and data may be of any size.
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


def without_middle(word, most):
    """A word of at most that many characters: its beginning and its end, if it is longer."""
    return word if len(word) <= most else f"{word[: most // 2 - 2]}...{word[1 - most // 2 :]}"
