"""Names that come from data, such as those of splits, features and runs, and are to name files or folders."""

import re
from collections.abc import Collection
from typing import TypeGuard

from featcache.atomic import PARTIAL
from featcache.errors import BadInput, shown

# What lies beside the splits of a store, in either format.
MANIFEST, COMMITS = "manifest.json", "commits"
# The manifest of what was added to a store later, with the beginning of its id.
ADDITION = re.compile(r"addition-([0-9a-f]{8})\.json")
BESIDE_SPLITS = (COMMITS, MANIFEST, "zarr.json", "index.h5")
# File systems allow 255 bytes, and the name of a file that is being written needs some more than the final one.
MOST_BYTES = 200


def file_name(name: object, what: str, taken: Collection[str] = ()) -> str:
    """Return `name` if it can name a file or folder, in Zarr and in HDF5, on any file system.

    what: what it names, such as "split"; an error begins with it. taken: names that mean something else in that
    folder. Raises BadInput for a name that is empty or blank, leaves the folder (`..`, a slash), cannot be
    shown (control characters, half a surrogate pair), or is kept for another use, as Zarr keeps names
    that begin with two underscores.
    """
    reason = _why_not(name, taken)
    if reason or not isinstance(name, str):
        raise BadInput(f"{what} {shown(name)} cannot be the name of a file: it {reason}; give it another name")
    return name


def split_name(name: object) -> str:
    """Return `name` if it can name a split, which becomes a folder of a store. Raises BadInput if it cannot."""
    if isinstance(name, str) and "@" in name:
        raise BadInput(f"split {shown(name)}: `@` is kept for the views of a split; give it another name")
    if isinstance(name, str) and ADDITION.fullmatch(name):
        raise BadInput(f"split {shown(name)}: the name is kept for what is added to a store; give it another name")
    return file_name(name, "split", BESIDE_SPLITS)


def is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is text that any file can hold: not blank, no zero byte, no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not unwritable(value)


def unwritable(text: str) -> str:
    """Return why a text can neither stand in a file nor be the path of one; an empty string if it can."""
    if "\0" in text:
        return "which has a zero byte in it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "which is not UTF-8"
    return ""


def _why_not(name: object, taken: Collection[str]) -> str | None:
    if not isinstance(name, str):
        return "is not text"
    if not name.strip():
        return "is empty"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if set(name) & set("/\\"):
        return "has a slash in it"
    if not name.strip("."):
        return "stands for a folder"
    if len(name.encode()) > MOST_BYTES:
        return f"has more than {MOST_BYTES} bytes"
    if name.startswith("__") or name.endswith(PARTIAL) or name in taken:
        return "is kept for other files"
    return None


def path_within(name: object, what: str) -> str:
    """Return `name` if it can be the path of a file within a folder, its parts joined by "/".

    Raises BadInput where `file_name` does for one of the parts.
    """
    if not isinstance(name, str):
        raise BadInput(f"{what} {shown(name)} is not the name of a file")
    for part in name.split("/"):
        file_name(part, f"{what} {shown(name)}:")
    return name
