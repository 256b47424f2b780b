"""The tables of a run folder: CSV files, of which large ones are compressed."""

import gzip
import zlib
from pathlib import Path

from featcache.atomic import remove, write_whole
from featcache.names import path_within
from featcache.store.sealed import unseal

# Holds the checksums of the files of attributions, which are made after the run.
ATTRIBUTION = "attribution.json"
# Larger ones nobody opens in an editor; compressed they are a twentieth of that.
LARGE = 8 << 20


def write_table(folder, name, data):
    """Write CSV, bytes, as `name`, or as name.gz if it is large, in the place of either; return {file: its checksum}."""
    plain, packed = Path(folder) / name, Path(folder) / f"{name}.gz"
    path, other = (packed, plain) if len(data) > LARGE else (plain, packed)
    # Without a time in it, so that the same table is the same bytes.
    data = gzip.compress(data, 5, mtime=0) if path is packed else data
    for place in (path, other) if path.is_dir() else (other,):
        remove(place)
    write_whole(path, data)
    return {path.name: checksum(data)}


def checksum(data):
    """What run.json says of a file's bytes."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def damaged_files(folder, files):
    """Yield (name, what is wrong) of files of a folder. files: {name: their checksum}."""
    for name, expected in files.items():
        try:
            if checksum((Path(folder) / path_within(name, "file")).read_bytes()) != expected:
                yield name, "its bytes do not fit its checksum"
        except OSError as error:
            yield name, error.strerror


def find_table(folder, name):
    """Path of a table, compressed or not; that of `name` if there is neither."""
    packed = Path(folder) / f"{name}.gz"
    return packed if packed.is_file() else Path(folder) / name


def open_table(folder, name):
    """Open a table for reading, as text for the csv module. Raises OSError."""
    path = find_table(folder, name)
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline="")


def attribution_files(run):
    """Checksums of the files of attributions, {name: checksum}, {} if there are none. Raises nothing: damage is damage."""
    try:
        return unseal((Path(run) / ATTRIBUTION).read_bytes())["files"]
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, ValueError):
        return {ATTRIBUTION: None}
