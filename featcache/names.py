"""Names that come from data, of splits, features or runs, where they are to name a file or a folder."""

from featcache.atomic import PARTIAL
from featcache.errors import BadInput, shown

# What lies beside the splits of a store, in either format.
BESIDE_SPLITS = ("commits", "manifest.json", "zarr.json", "index.h5")
# File systems take 255 bytes; what is added to a name while its file is written needs some of them.
MOST_BYTES = 200


def file_name(name, what, taken=()):
    """Return a name that can be that of one file or folder, in Zarr and in HDF5, on any file system.

    what: what is named, to begin an error with, such as "split". taken: names that mean something else in that
    folder. Raises BadInput for anything that is empty or blank, leaves the folder (`..`, a slash), cannot be
    shown (control characters, half a surrogate pair), or is kept for another use, which Zarr does for names
    that begin with two underscores.
    """
    reason = _why_not(name, taken)
    if reason:
        raise BadInput(f"{what} {shown(name)} cannot be the name of a file: it {reason}; give it another name")
    return name


def split_name(name):
    """Return a name that can be that of a split, which becomes a folder of a store. Raises BadInput."""
    if isinstance(name, str) and "@" in name:
        raise BadInput(f"split {shown(name)}: `@` is kept for the views of a split; give it another name")
    return file_name(name, "split", BESIDE_SPLITS)


def is_text(value):
    """Whether a value is text that any file can hold: not blank, without a zero byte or half a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not unwritable(value)


def unwritable(text):
    """Why a text can be neither in a file nor the path of one, or an empty string."""
    if "\0" in text:
        return "which has a zero byte in it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "which is not UTF-8"
    return ""


def _why_not(name, taken):
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


def path_within(name, what):
    """Return the path of a file within a folder, its parts joined by "/", if it does not leave that folder.

    Raises BadInput as `file_name` does, for any of the parts.
    """
    if not isinstance(name, str):
        raise BadInput(f"{what} {shown(name)} is not the name of a file")
    for part in name.split("/"):
        file_name(part, f"{what} {shown(name)}:")
    return name
