"""Standard streams that are closed, or whose reader has gone: nobody listens, and the work goes on."""

import contextlib
import io
import os
import select
import sys


class _Deaf(io.FileIO):
    """A file that takes whatever is written to it, and drops what cannot be."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams():
    """Make notices and progress bars safe to write, whatever standard error is, and text safe to print.

    A closed stream becomes one that swallows everything. Otherwise the next file to be opened, of a store for
    one, would have its number, and be written to by whatever writes to standard error.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    # What another program has put in its place is left alone.
    if sys.stderr is sys.__stderr__ or sys.__stderr__ is None:
        raw = _Deaf(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", write_through=True
        )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def output_is_broken():
    """Whether nobody can read standard output any more, a pipe."""
    asked = select.poll()
    asked.register(1, 0)
    return bool(asked.poll(0))


def drop_output():
    """Let what is still to be written to a broken standard output go nowhere, or Python would complain at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
