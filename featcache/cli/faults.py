"""What a machine can do to a command, each in one line with a remedy."""

import errno
import os
import re

from featcache.errors import of_the_system

AGAIN = "and run the same command again"
# What options of a command can do for want of memory.
SMALLER = {"batch_size": "a smaller --batch-size", "workers": "fewer --workers", "memory": "less --memory"}
# torch, and what it calls, have no exceptions of their own for these; the words are lower case.
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "bad_alloc",
    "could not create a memory object", "could not create a primitive", "can't start new thread",
    "failed to map segment",
)  # fmt: skip
NO_FILES = ("too many open files", "ancdata", f"exit code {errno.EMFILE}")
NO_SHARED_MEMORY = ("shared memory", "</torch_")
WORKER_KILLED = "dataloader worker (pid"


def explain(error):
    """Return a line for an error that is the machine's, or None."""
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply; make it flatter"
    if isinstance(error, OSError):
        # A full disk, a folder without permission: the path and the system's word.
        path = error.filename
        place = os.fsdecode(path) if isinstance(path, str | bytes) else "input or output"
        return f"{place}: {of_the_system(error)}"
    return None


def scarcity(error, options=()):
    """Return a line for want of memory or of files, else None, also where what met it took it for something else.

    A file that cannot be read for want of memory looks damaged to its reader. options: names of the options that the
    command has, for the remedy.
    """
    while error is not None:
        line = _scarce(error, options)
        if line is not None:
            return line
        error = error.__cause__ or error.__context__
    return None


def _scarce(error, options):
    text = str(error).lower() if isinstance(error, (RuntimeError, OSError, ImportError)) else ""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or any(word in text for word in NO_FILES):
        fewer = " or take fewer --workers" if "workers" in options else ""
        return f"too many open files: raise the limit (ulimit -n 4096){fewer}, {AGAIN}"
    if WORKER_KILLED in text:
        return (
            f"a decoding process was killed, most likely for want of memory ({_first(error)}): take --workers 1, "
            f"{AGAIN}; it goes on where it stopped"
        )
    if any(word in text for word in NO_SHARED_MEMORY):
        return (
            f"no room in shared memory, /dev/shm: give it more (docker run --shm-size 2g) or take --workers 0, {AGAIN}"
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(word in text for word in NO_MEMORY):
        remedies = [SMALLER[name] for name in SMALLER if name in options]
        if "device" in options and "cuda" in text:
            remedies.append("--device cpu")
        return f"out of memory ({_first(error)}): take {', '.join([*remedies, 'or ' * bool(remedies) + 'a machine with more memory'])}"
    return None


def _first(error):
    """What an error says first: torch explains at length."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ". ".join(re.sub(r"^\[enforce fail [^]]*\] .*?\. ", "", lines[0]).split(". ")[:2]).rstrip(".")
