"""What attribute finds, as files of the run: attribution.csv, and attribution.npz for the report's pictures."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.attribution.batch import Source
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.probes.runs.run_file import ATTRIBUTION, seal_files, write_file
from featcache.store.folder import open_folder

# Which map a row of attribution.csv is about; the columns of the scores follow.
IDENTITY = ("probe", "method", "split", "id", "class")


@dataclass(frozen=True, eq=False)
class Result:
    """What is known of one map: its row of attribution.csv, and its values, float32 [S, S], if the report shows it."""

    row: dict[str, Any]
    values: np.ndarray | None


def columns_of(scores: Sequence[LocalisationScore]) -> list[str]:
    """Return the columns of attribution.csv."""
    return [*IDENTITY, *(column for score in scores for column in score.columns)]


def write_results(
    run: Path, columns: Sequence[str], results: Sequence[Result], kept: Sequence[int], source: Source
) -> None:
    """Write both files into a run, each whole or not at all, and their checksums into run.json.

    columns: of attribution.csv. kept: rows of the split that the report shows.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **_arrays(columns, results, kept, source))
    written = dict(zip(ATTRIBUTION, (_csv(columns, results), buffer.getvalue()), strict=True))
    with open_folder(run).locked(f"waiting: another process is training into {run}"):
        # run.json does not list them until both are written.
        seal_files(run, dict.fromkeys(written))
        seal_files(run, {name: write_file(run, name, data) for name, data in written.items()})


def _csv(columns: Sequence[str], results: Sequence[Result]) -> bytes:
    """Lay out the rows as CSV; NaN is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v != v else v for k, v in result.row.items()} for result in results)
    return text.getvalue().encode()


def _arrays(
    columns: Sequence[str], results: Sequence[Result], kept: Sequence[int], source: Source
) -> dict[str, np.ndarray]:
    """The arrays of attribution.npz: the kept images, their boxes, and the maps with their rows as text."""
    split, size = source.split, source.preprocessing.size
    maps = [result.values for result in results if result.values is not None]
    texts = [[str(result.row[k]) for k in columns] for result in results if result.values is not None]
    arrays = {
        "ids": np.array([split.ids[row] for row in kept]),
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
    split = source.split
    names = np.array(split.store.classes)
    parts = [(np.empty(0, int), np.empty((0, 4)), names[:0], np.empty(0, bool))]
    for number, row in enumerate(kept):
        boxes, classes, difficult = split.boxes[row]
        boxes, inside = source.preprocessing.map_boxes(boxes, *split.sizes[row].tolist())
        parts.append((np.full(inside.sum(), number), boxes[inside], names[classes[inside]], difficult[inside]))
    arrays = ("box_examples", "boxes", "box_classes", "box_difficult")
    return {name: np.concatenate(part) for name, part in zip(arrays, zip(*parts, strict=True), strict=True)}
