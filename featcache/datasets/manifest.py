"""A manifest: one CSV, JSONL or Parquet file that lists images and their labels."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.datasets.label_lists import SEPARATORS, Where
from featcache.datasets.labels import group_splits, index_labels
from featcache.datasets.layout import parse_json, read_flag
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput, nearest, shown

ONE_SPLIT = "all"
# {name of a column of labels: the rule by which its texts are read, see split_texts}
LABELS = {"label": "label", "labels": "labels", "label:one": "one"} | {f"labels:{word}": word for word in SEPARATORS}
# Columns with a meaning of their own; if there is none of LABELS, all others are classes.
COLUMNS = ("path", "split", "id", "boxes")
HELP = "columns: path, then label, or labels (names with ; between), or a 0/1 column for each class; split, id, boxes"
ADVICE = f"if that is wrong, call the column {', '.join(list(LABELS)[2:-1])} or {list(LABELS)[-1]}"


def read_manifest_file(path: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read a manifest, see docs/datasets.md.

    path: a .csv, .jsonl or .parquet file; image paths in it are relative to its folder. Classes are
    those of all its rows, whichever splits are asked for. Raises BadInput with the line at fault.
    """
    rows = _read_rows(path)
    numbers = [number for number, _ in rows]
    values = [row for _, row in rows]

    def where(n: int) -> str:
        return f"{path} {'row' if path.suffix == '.parquet' else 'line'} {numbers[n]}"

    for n, row in enumerate(values):
        if not isinstance(row.get("path"), str) or not row["path"].strip():
            raise BadInput(f"{where(n)}: no path ({HELP})")
    classes, task, labels = _labels(path, values, where)
    records = []
    for n, row in enumerate(values):
        image = row["path"].strip()
        boxes = _boxes(row.get("boxes"), classes, where, n)
        image_id, split = _cell(row, "id", image, where, n), _cell(row, "split", ONE_SPLIT, where, n)
        record = Record(id=image_id, image=os.path.join(path.parent, image), labels=labels[n], **boxes)
        records.append((split, record))
    return group_splits("manifest", classes, task, records, splits, path)


def _cell(row: dict[str, Any], column: str, default: str, where: Where, n: int) -> str:
    value = row.get(column)
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadInput(f"{where(n)}: {column} {shown(value)} is neither text nor a whole number")
    return str(value).strip()


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return [(line or row number, {column: value})]."""
    if not path.is_file():
        raise BadInput(f"manifest not found: {path} (give the .csv, .jsonl or .parquet file with --root)")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise BadInput(f"manifest {path} is no {', '.join(readers)} file")
    try:
        rows = readers[path.suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read manifest {path}: {error}") from None
    if not rows:
        raise BadInput(f"manifest {path} lists no image")
    return rows


def _read_csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[tuple[int, dict[Any, Any]]] = [(reader.line_num, row) for row in reader]
        columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise BadInput(f"{path} line 1: a column comes twice")
    for number, row in rows:
        if None in row or None in row.values():
            raise BadInput(
                f"{path} line {number}: line 1 has {len(columns)} columns, this line has more or fewer fields"
            )
    return rows


def _read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            rows.append((number, parse_json(line, f"broken JSON in {path}", number)))
            if not isinstance(rows[-1][1], dict):
                raise BadInput(f"{path} line {number}: not an object")
    return rows


def _read_parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path} needs pyarrow: pip install 'featcache[parquet]'") from None
    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist()))
    except pyarrow.ArrowException as error:
        raise BadInput(f"cannot read manifest {path}: {error}") from None


def _labels(
    path: Path, rows: Sequence[dict[str, Any]], where: Where
) -> tuple[tuple[str, ...], str, Sequence[int | np.ndarray]]:
    """Return (classes, task, labels), from the column `label`, the column `labels`, or a column for each class."""
    columns = dict.fromkeys(key for row in rows for key in row)
    given = [column for column in columns if column.partition(":")[0] in ("label", "labels")]
    if len(given) > 1:
        raise BadInput(f"{path} has both a {given[0]} and a {given[1]} column")
    if given and given[0] not in LABELS:
        raise BadInput(f"{path} has a column {given[0]!r}{nearest(given[0], LABELS)} (known: {', '.join(LABELS)})")
    if given:
        values = [row.get(given[0]) for row in rows]
        place = f"column {given[0]!r} of {path}"
        return index_labels(values, where, place, rule=LABELS[given[0]], advice=[ADVICE])
    # Spreadsheets leave the column of their row numbers without a name.
    classes = tuple(c for c in columns if c not in COLUMNS and c.strip())
    if not classes:
        raise BadInput(f"{path} has no labels ({HELP})")
    matrix = []
    for n, row in enumerate(rows):
        cells = [str(row.get(c)).strip() for c in classes]
        for name, cell in zip(classes, cells, strict=True):
            if cell not in ("0", "1", "-1"):
                raise BadInput(f"{where(n)}: column {name!r} is {cell!r}, not 0, 1 or -1 ({HELP})")
        matrix.append(np.array(cells, dtype=np.int8))
    return classes, "multi-label", matrix


def _boxes(value: Any, classes: tuple[str, ...], where: Where, n: int) -> dict[str, Any]:
    """Return a Record's fields of boxes, from [{"box": [x0, y0, x1, y1], "label": class, "difficult": optional}]."""
    if value is None or value == "":
        return {}
    entries = parse_json(value, f"{where(n)}: boxes are broken JSON") if isinstance(value, str) else value
    try:
        if not isinstance(entries, list):
            raise TypeError(f"{shown(entries)} is no list")
        boxes = np.array([_corners(e["box"]) for e in entries], np.float32).reshape(-1, 4)
        names = [_class_of(e["label"], classes) for e in entries]
        difficult = np.array([read_flag(e.get("difficult")) for e in entries], bool)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BadInput(
            f'{where(n)}: boxes must be a list of {{"box": [x0, y0, x1, y1], "label": a class}}: {error}'
        ) from None
    if any(not 0 <= label < len(classes) for label in names):
        raise BadInput(f"{where(n)}: a box's label is out of range, there are {len(classes)} classes")
    return {"boxes": boxes, "box_classes": np.array(names, np.int64), "box_difficult": difficult}


def _corners(box: Any) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise ValueError(f"{shown(box)} is no four numbers")
    return box


def _class_of(label: Any, classes: tuple[str, ...]) -> int:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise TypeError(f"{shown(label)} is no class")
    if isinstance(label, int):
        return label
    if label not in classes:
        raise ValueError(f"{shown(label)} is not one of the classes{nearest(label, classes)}")
    return classes.index(label)
