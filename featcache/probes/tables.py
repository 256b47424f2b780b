"""The tables of a run folder: CSV files, of which large ones are compressed."""

import gzip
from pathlib import Path

from featcache.atomic import write_whole

# Larger ones nobody opens in an editor; compressed they are a twentieth of that.
LARGE = 8 << 20


def write_table(folder, name, data):
    """Write CSV, bytes, as `name`, or as name.gz if it is large, in the place of either."""
    plain, packed = Path(folder) / name, Path(folder) / f"{name}.gz"
    path, other = (packed, plain) if len(data) > LARGE else (plain, packed)
    # Without a time in it, so that the same table is the same bytes.
    write_whole(path, gzip.compress(data, 5, mtime=0) if path is packed else data)
    other.unlink(missing_ok=True)


def find_table(folder, name):
    """Path of a table, compressed or not; that of `name` if there is neither."""
    packed = Path(folder) / f"{name}.gz"
    return packed if packed.is_file() else Path(folder) / name


def open_table(folder, name):
    """Open a table for reading, as text for the csv module. Raises OSError."""
    path = find_table(folder, name)
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline="")
