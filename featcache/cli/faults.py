"""Faults of the machine that a command can meet, each said in one line with a remedy."""

import errno
import os
import re
from collections.abc import Collection

from featcache.errors import of_the_system

AGAIN = "and run the same command again"
# How options of a command can make it take less memory.
SMALLER = {"batch_size": "a smaller --batch-size", "workers": "fewer --workers", "memory": "less --memory"}
# torch and its libraries have no exceptions for these; only their messages tell, which are compared in lower case.
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "bad_alloc",
    "could not create a memory object", "could not create a primitive", "can't start new thread",
    "failed to map segment",
)  # fmt: skip
NO_FILES = ("too many open files", "ancdata", f"exit code {errno.EMFILE}")
NO_SHARED_MEMORY = ("shared memory", "</torch_")
WORKER_KILLED = "dataloader worker (pid"


def explain(error: BaseException) -> str | None:
    """Return a line for an error of the machine, or None for any other."""
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply; make it flatter"
    if isinstance(error, OSError):
        # For example a full disk, or a folder without permission.
        path = error.filename
        place = os.fsdecode(path) if isinstance(path, str | bytes) else "input or output"
        return f"{place}: {of_the_system(error)}"
    return None


def scarcity(error: BaseException, options: Collection[str] = ()) -> str | None:
    """Return a line if memory or open files ran out, else None.

    The error may be one that followed from that: to its reader a file looks damaged that cannot be read because
    memory ran out. options: names of the options that the command has, for the remedy.
    """
    cause: BaseException | None = error
    while cause is not None:
        line = _scarce(cause, options)
        if line is not None:
            return line
        cause = cause.__cause__ or cause.__context__
    return None


def _scarce(error: BaseException, options: Collection[str]) -> str | None:
    """As scarcity, for this error alone."""
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


def _first(error: BaseException) -> str:
    """Return the beginning of an error's message; torch explains at length."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ". ".join(re.sub(r"^\[enforce fail [^]]*\] .*?\. ", "", lines[0]).split(". ")[:2]).rstrip(".")
