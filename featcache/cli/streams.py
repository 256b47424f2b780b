"""Standard streams that are closed, or whose reader has gone: the work goes on without a listener."""

import contextlib
import io
import os
import select
import sys
from typing import Any


class _Deaf(io.FileIO):
    """A file that takes whatever is written to it, and drops what cannot be written."""

    def write(self, data: Any) -> int:
        """Write bytes. Returns their number, whether they were written or not."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Make notices and progress bars safe to write, whatever standard error is, and text safe to print.

    A closed stream becomes one that swallows everything. Otherwise the next file to be opened, such as one of a
    store, would get its number, and whatever writes to standard error would write into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The system gives out the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    # A stream that another program has put in its place is left alone.
    if sys.stderr is sys.__stderr__ or sys.__stderr__ is None:
        raw = _Deaf(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", write_through=True
        )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def output_is_broken() -> bool:
    """Whether standard output is a pipe that nobody can read any more."""
    asked = select.poll()
    asked.register(1, 0)
    return bool(asked.poll(0))


def drop_output() -> None:
    """Send the rest of a broken standard output nowhere, since Python would complain about it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
