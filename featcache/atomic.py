"""Files that appear whole or not at all, and stay after a power cut."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from featcache.errors import BadInput

PARTIAL = ".partial"


def local_path(path, option):
    """Return a path as a Path. Raises BadInput, which names the option, for a URL: nothing but a store lies at one."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise BadInput(f"{option} {path} is a URL, where only stores can lie; give a path of this machine")
    return Path(path)


def sync_folder(path):
    """Flush a folder's entries to disk (a rename is durable only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path, tag=""):
    """Yield a binary file that takes the place of `path` when the block ends without an error.

    Writes to `path` + tag + ".partial", then fsync, rename, fsync of the folder. After an error the
    partial file is removed and `path` is as it was. tag: tells apart writers of the same path.
    """
    path = Path(path)
    if not path.name:
        raise BadInput(f"{str(path)!r} is a folder; give the path of the file to write")
    partial = path.with_name(path.name + tag + PARTIAL)
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # A write to a full disk does not say where.
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_whole(path, data):
    """Write bytes or text to `path`, all or nothing."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove(path):
    """Delete what lies at a path, a folder with all that is in it; a link goes, not what it leads to."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
