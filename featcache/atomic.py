"""Files that appear whole or not at all, and survive a power cut."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from featcache.errors import BadInput

PARTIAL = ".partial"


def local_path(path: str | os.PathLike[str], option: str) -> Path:
    """Return a path as a Path. Raises BadInput, which names the option, for a URL: only stores can lie at one."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise BadInput(f"{option} {path} is a URL, where only stores can lie; give a path of this machine")
    return Path(path)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to disk (a rename is durable only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str], tag: str = "") -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path` when the block ends without an error.

    It is written as `path` + tag + ".partial" and flushed to disk, then renamed, then the folder is flushed. After an
    error the partial file is removed and `path` is as it was. tag: distinguishes writers of the same path.
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


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write bytes or text to `path`, all or nothing."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file, or a folder with everything in it. If the path is a link, only the link goes."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
