"""What attribute finds, as files of the run: attribution.csv, and attribution.npz for the report's pictures."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from featcache.attribution.batch import Source
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
    source = task.source
    for method, kind in enumerate(task.methods):
        for piece, targets in enumerate(task.pieces):
            for probe, one in enumerate(task.explained):
                for number, target in enumerate(targets):
                    identity = (
                        one.probe,
                        one.named(kind),
                        source.name,
                        source.id_of(target.row),
                        source.split.store.classes[target.label],
                    )
                    yield method, piece, probe, number, identity


def write_results(task: Task, rows: Sequence[dict[str, Any]], pieces: Sequence[Piece]) -> None:
    """Write both files into the run, each whole or not at all, and their checksums into run.json."""
    run, buffer = task.run.path, io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **_arrays(task, rows, pieces))
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


def _arrays(task: Task, rows: Sequence[dict[str, Any]], pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    """The arrays of attribution.npz: the kept images, their boxes, and the maps with their rows as text."""
    source, kept = task.source, task.kept
    size, columns = source.preprocessing.size, [*IDENTITY, *task.columns]
    maps, texts = [], []
    for row, (method, piece, probe, number, _) in zip(rows, _places(task), strict=True):
        if (target := task.pieces[piece][number]).row in kept:
            shown = [each for each in task.pieces[piece] if each.row in kept]
            maps.append(pieces[piece].maps[method, probe, shown.index(target)].numpy())
            texts.append([str(row[column]) for column in columns])
    arrays = {
        "ids": np.array([source.id_of(row) for row in kept]),
        **_boxes(kept, source),
        "maps": np.stack(maps) if maps else np.empty((0, size, size), np.float32),
        "panels": np.array(texts).reshape(-1, len(columns)),
    }
    if source.network:
        pictures = [source.network.picture(row).permute(1, 2, 0).numpy() for row in kept]
        arrays["images"] = np.stack(pictures) if pictures else np.empty(0)
    return arrays


def _boxes(kept: Sequence[int], source: Source) -> dict[str, np.ndarray]:
    """The boxes of all kept images, in pixels of the maps; box_examples says which image each box is in."""
    names = np.array(source.split.store.classes)
    parts = [(np.empty(0, int), np.empty((0, 4)), names[:0], np.empty(0, bool))]
    for number, row in enumerate(kept):
        boxes, classes, difficult = source.boxes_of(row)
        parts.append((np.full(len(boxes), number), boxes, names[classes], difficult))
    arrays = ("box_examples", "boxes", "box_classes", "box_difficult")
    return {name: np.concatenate(part) for name, part in zip(arrays, zip(*parts, strict=True), strict=True)}
