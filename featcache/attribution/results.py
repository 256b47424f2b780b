"""What attribute finds, as files of the run: attribution.csv, and attribution.npz for the report's pictures."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.attribution.pieces import Piece
from featcache.attribution.task import Task
from featcache.probes.runs.run_file import ATTRIBUTION, seal_files, write_file
from featcache.store.folder import open_folder

# Which map a row of attribution.csv is about; the columns of the scores follow.
IDENTITY = ("probe", "method", "split", "id", "class")


def rows_of(task: Task, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return the rows of attribution.csv: by methods, then pieces, then probes, then targets."""
    return [
        dict(
            zip(
                (*IDENTITY, *task.columns),
                (*identity, *pieces[piece].cells[method, probe, target].tolist()),
                strict=True,
            )
        )
        for method, piece, probe, target, identity in _places(task)
    ]


def _places(task: Task) -> Iterator[tuple[int, int, int, int, tuple[str, ...]]]:
    """Yield the numbers of method, piece, probe and target of every row, in order, and its identity."""
    for method in range(len(task.methods)):
        for piece, targets in enumerate(task.pieces):
            for probe in range(len(task.explained)):
                for number, target in enumerate(targets):
                    yield method, piece, probe, number, task.identity(method, probe, target)


def write_results(task: Task, rows: Sequence[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
    """Write both files into the run, each whole or not at all, and their checksums into run.json.

    arrays: of attribution.npz.
    """
    run, buffer = task.run.path, io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **arrays)
    columns = [*IDENTITY, *task.columns]
    written = dict(zip(ATTRIBUTION, (_csv(columns, rows), buffer.getvalue()), strict=True))
    with open_folder(run).locked(f"waiting: another process is training into {run}"):
        # run.json does not list them until both are written.
        seal_files(run, dict.fromkeys(written))
        seal_files(run, {name: write_file(run, name, data) for name, data in written.items()})


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    """Lay out the rows as CSV; NaN is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()
