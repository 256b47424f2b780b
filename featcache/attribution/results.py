"""What attribute finds, as files of the run: a table, how it was made, and the maps that the report shows."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache.atomic import remove
from featcache.attribution.pieces import Piece
from featcache.attribution.saved_maps import checksums
from featcache.attribution.task import Task
from featcache.errors import BadInput, nearest
from featcache.probes.runs.run_file import (
    ATTRIBUTION,
    SAVED_MAPS,
    TABLES,
    of_attribution,
    read_summary,
    seal_files,
    write_file,
)
from featcache.probes.runs.tables import import_parquet
from featcache.store.folder import open_folder
from featcache.words import written

# Which map a row of attribution.csv is about; the columns of the scores follow.
IDENTITY = ("probe", "method", "split", "id", "class")


def check_format(format: str) -> None:
    """Raise BadInput unless a table can be written in a format."""
    known = [name.partition(".")[2] for name in TABLES]
    if format not in known:
        raise BadInput(f"--to {format}: unknown format{nearest(format, known)} (known: {', '.join(known)})")
    if format == "parquet":
        import_parquet()


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


def write_results(
    task: Task, rows: Sequence[dict[str, Any]], arrays: Mapping[str, np.ndarray], maps: Path | None
) -> None:
    """Write the files of an attribution into the run, each whole or not at all, and their checksums into run.json.

    arrays: of attribution.npz. maps: folder of a Zarr group of all maps, which is moved into the run. Files of an earlier attribution are deleted.
    """
    run, buffer = task.run.path, io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **arrays)
    columns, facts = [*IDENTITY, *task.columns], facts_of(task)
    format = task.settings.format
    table = _csv(columns, rows) if format == "csv" else _parquet(columns, rows, facts)
    files = {
        f"attribution.{format}": table,
        "attribution.npz": buffer.getvalue(),
        "attribution.json": json.dumps(facts, indent=1).encode() + b"\n",
    }
    saved = {} if maps is None else checksums(maps)
    with open_folder(run).locked(f"waiting: another process is training into {run}"):
        # run.json does not list them until all are written.
        before = filter(of_attribution, read_summary(run).get("files", {}))
        seal_files(run, dict.fromkeys((*before, *ATTRIBUTION)))
        for name in (*ATTRIBUTION, SAVED_MAPS):
            if name not in files:
                remove(run / name)
        entries = {name: write_file(run, name, data) for name, data in files.items()}
        if maps is not None:
            os.rename(maps, run / SAVED_MAPS)
        seal_files(run, entries | saved)


def facts_of(task: Task) -> dict[str, Any]:
    """Return what attribution.json says: all that the numbers of the table depend on, as JSON values."""
    source, settings = task.source, task.settings
    targets = [target for piece in task.pieces for target in piece]
    explained = [(source.id_of(target.row), source.split.store.classes[target.label]) for target in targets]
    return {
        "protocol": task.protocol.label,
        "parity": settings.parity,
        "methods": [method.label for method in task.methods],
        "scores": [written(score) for score in task.scores],
        "split": source.split.name,
        "images": len({target.row for target in targets}),
        "pairs": len(targets),
        # Equal in two attributions that explain the same classes of the same images, and of the same grids.
        "set": hashlib.sha256(json.dumps(explained).encode()).hexdigest()[:16],
        **source.facts,
        "store_id": source.split.store.id,
        "backbone": source.backbone.weights_sha256 if source.network else None,
        "preprocessing": source.preprocessing.describe(),
        "seed": settings.seed,
        "random_heads": any(one.note for one in task.explained),
        "random_backbone": task.randomised.backbone.weights_sha256 if task.randomised else None,
        "device": source.device.type,
        "version": featcache.__version__,
    }


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    """Lay out the rows as CSV; NaN is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def _parquet(columns: Sequence[str], rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> bytes:
    """Lay out the rows as Parquet; NaN is null. The metadata of the file hold the facts."""
    parquet = import_parquet()
    import pyarrow

    kinds = [pyarrow.string() if name in IDENTITY else pyarrow.float64() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)), {"featcache": json.dumps(facts)})
    values = {name: [None if row[name] != row[name] else row[name] for row in rows] for name in columns}
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pydict(values, schema), file, compression="zstd")
    return file.getvalue()
