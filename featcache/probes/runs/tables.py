"""The tables of a run folder: CSV files. Large ones are compressed."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from featcache.atomic import remove
from featcache.errors import BadInput
from featcache.probes.runs.run_file import Files, read_file, write_file
from featcache.probes.scores.metrics import metric_kind

# Larger tables are compressed: nobody opens them in an editor, and they shrink to a twentieth.
LARGE = 8 << 20
# A file that unpacks to more times its size, or has longer lines, is an attempt to fill the memory, and no table.
MOST_UNPACKED, LONGEST_LINE = 300, 16 << 20
# The columns of scores.csv before the fields of the probe.
SCORE_COLUMNS = ("probe", "name", "split", "metric", "value", "low", "high", "epoch")


# The table of what probes chose for each class. Runs without such probes have none.
COSTS, COST_COLUMNS = "costs.csv", ("probe", "class", "cost", "ap", "folds", "chosen", "excess", "draw")


def tables_of(metrics: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return {name: first columns} of the tables of a run. metrics: those that it is scored with."""
    tables = {
        "scores.csv": SCORE_COLUMNS,
        "seeds.csv": ("name", "split", "metric", "mean", "std", "n", "diverged", "seeds", "probes"),
        "history.csv": ("probe", "epoch", "loss"),
        "calibration.csv": ("probe", "split", "bin"),
    }
    by_class = [column for metric in metrics if (column := metric_kind(metric).class_column)]
    if by_class:
        tables["scores_per_class.csv"] = ("probe", "split", "class", *by_class, "positives")
    return tables


def write_table(folder: str | Path, name: str, data: bytes) -> dict[str, dict[str, int]]:
    """Write CSV, bytes, as `name`, or as name.gz if it is large, and remove the other of the two.

    Returns {name of the file: its entry in run.json}.
    """
    plain, packed = Path(folder) / name, Path(folder) / f"{name}.gz"
    path, other, held = plain, packed, data
    if len(data) > LARGE:
        # Without a time stamp, so that equal tables have equal bytes.
        small = gzip.compress(data, 5, mtime=0)
        if len(data) <= MOST_UNPACKED * len(small):
            path, other, held = packed, plain, small
    written = write_file(folder, path.name, held)
    remove(other)
    return {path.name: written}


def find_table(folder: str | PathLike[str], name: str) -> Path:
    """Return the path of a table: name.gz if that exists, else `name`."""
    packed = Path(folder) / f"{name}.gz"
    return packed if packed.is_file() else Path(folder) / name


def read_table(folder: str | PathLike[str], name: str, files: Files | None = None) -> Iterator[dict[str, str]]:
    """Yield the rows of a table, CSV or Parquet, as dicts of strings.

    files: those of run.json, whose checksum the table must fit; None for a run without checksums. Raises ValueError,
    which says what is wrong.
    """
    if name.endswith(".parquet"):
        yield from _parquet_rows(read_file(folder, name, files))
        return
    path = find_table(folder, name)
    if files is not None:
        path = path.with_name(name if name in files else f"{name}.gz")
    data = read_file(folder, path.name, files)
    try:
        reader = csv.DictReader(_lines(data, path.suffix == ".gz"))
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"row {reader.line_num} has other columns than the first")
            yield row
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None


def _parquet_rows(data: bytes) -> Iterator[dict[str, str]]:
    """Yield the rows of a Parquet file, given as bytes, as CSV would have them."""
    parquet = import_parquet()
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise ValueError(str(error)) from None
    for row in table.to_pylist():
        yield {name: "" if value is None else str(value) for name, value in row.items()}


def import_parquet() -> Any:
    """Return the module pyarrow.parquet. Raises BadInput if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput("Parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    return pyarrow.parquet


def _lines(data: bytes, packed: bool) -> Iterator[str]:
    """Yield the lines of CSV, given as bytes. packed: whether these are compressed."""
    file, most = io.BytesIO(data), MOST_UNPACKED * len(data)
    text = io.TextIOWrapper(gzip.open(file) if packed else file, encoding="utf-8", newline="")
    while line := text.readline(LONGEST_LINE):
        most -= len(line)
        if len(line) == LONGEST_LINE or (packed and most < 0):
            raise ValueError("it is far larger than any table")
        yield line
