"""What a machine can do to a command, each in one line with a remedy."""

import errno
import os

AGAIN = "and run the same command again"
MORE_SPACE = f"free some space, {AGAIN}"
DISK = {
    errno.ENOSPC: MORE_SPACE,
    errno.EDQUOT: MORE_SPACE,
    errno.EFBIG: f"raise the largest size of a file (ulimit -f) or choose another place, {AGAIN}",
    errno.EROFS: "choose a place that can be written to",
}
# What the options that a command has can do for want of memory, of any kind.
SMALLER = {"batch_size": "a smaller --batch-size", "workers": "fewer --workers", "memory": "less --memory"}
# torch, and what it calls, have no exception of their own for most of these; words of theirs that are stable.
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "bad_alloc",
    "could not create a memory object", "could not create a primitive", "can't start new thread",
)  # fmt: skip
NO_FILES = ("too many open files", "ancdata", f"exit code {errno.EMFILE}")
NO_SHARED_MEMORY = ("shared memory", "</torch_")
KILLED = "dataloader worker (pid"


def explain(error, options=()):
    """Return a line for an error that is the machine's and not ours, or None.

    options: names of the options that the command has, which the remedy may take.
    """
    text = str(error).lower()
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or _says(error, text, NO_FILES):
        fewer = " or take fewer --workers" if "workers" in options else ""
        return f"too many open files: raise the limit (ulimit -n 4096){fewer}, {AGAIN}"
    if _says(error, text, (KILLED,)):
        return (
            f"a decoding process was killed, most likely for want of memory ({_first(error)}): take --workers 1, "
            f"{AGAIN}; it goes on where it stopped"
        )
    if _says(error, text, NO_SHARED_MEMORY):
        return f"no room in shared memory, /dev/shm: give it more (docker run --shm-size 2g) or take --workers 0, {AGAIN}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _says(error, text, NO_MEMORY):
        place = "--device cpu" if "device" in options and "cuda" in text else "a machine with more memory"
        remedies = [SMALLER[name] for name in SMALLER if name in options]
        return f"out of memory ({_first(error)}): take {', '.join([*remedies, 'or ' * bool(remedies) + place])}"
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply; make it flatter"
    if isinstance(error, OSError):
        # A full disk, a folder without permission: nothing of ours, so the path and the system's word.
        remedy = f"; {DISK[number]}" if number in DISK else ""
        return f"{_path(error)}: {error.strerror or error}{remedy}"
    return None


def _says(error, text, words):
    return isinstance(error, (RuntimeError, OSError)) and any(word in text for word in words)


def _first(error):
    """What an error says first: torch explains at length, with the stack of its C++."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".")


def _path(error):
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "input or output"
