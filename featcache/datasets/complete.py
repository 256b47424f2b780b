"""From the records that a layout lists to complete ones: sizes measured, boxes and ids checked."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from featcache.datasets.image import measure_image
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput, shown
from featcache.names import is_text
from featcache.progress import Progress, say

# Many threads, since they wait for the disk. A task is a run of images, since a task for each would be all overhead.
THREADS = 16
TASK = 64
# Every row of a store has room for the longest id.
MOST_ID_BYTES = 4096
# The longest side that PNG allows; JPEG allows less.
MOST_PIXELS = 2**31 - 1

Item = TypeVar("Item")
Result = TypeVar("Result")


def completed(dataset: Dataset) -> Dataset:
    """Return the dataset with file and pixel sizes in every record, and its boxes clipped to the image.

    Reads the header of every image whose size no annotation gives, in threads. Raises BadInput for an image that
    is missing or has no header, for an id that comes twice, and for a box that lies outside its image.
    """
    splits: dict[str, tuple[Record, ...]] = {}
    cut = 0
    for name in dataset.classes:
        if not is_text(name):
            raise BadInput(f"{dataset.name}: a class has the name {shown(name)}, which is not text that can be written")
    for split, records in dataset.splits.items():
        where = f"{dataset.name}, split {split}"
        for image_id in repeated_ids(records)[:1]:
            raise BadInput(f"{where}: id {shown(image_id)} comes twice")
        _check_records(records, dataset, where)
        splits[split] = tuple(over_threads(_complete_record, records, f"sizes of {split}", "img", THREADS))
        pairs = zip(records, splits[split], strict=True)
        cut += sum(int((a.boxes != b.boxes).any(1).sum()) for a, b in pairs if len(a.boxes))
    if cut:
        say(f"notice: {cut:,} boxes hang over the edges of their images and were cut there")
    return replace(dataset, splits=splits)


def _check_records(records: Sequence[Record], dataset: Dataset, where: str) -> None:
    """Raise BadInput for a record whose id, size, labels or boxes cannot be stored as they are."""
    classes = len(dataset.classes)
    for record in records:
        # There may be millions, so no message is made before something is wrong.
        reason = _unfit(record, dataset.task, classes)
        if reason:
            raise BadInput(f"{where}, image {shown(record.id)}: {reason}")


def _unfit(record: Record, task: str, classes: int) -> str | None:
    """Return what about a record cannot be stored, or None."""
    if not is_text(record.id) or len(record.id.encode()) > MOST_ID_BYTES:
        return f"its id is not text of at most {MOST_ID_BYTES:,} bytes that can be written"
    if isinstance(record.image, str) and not is_text(record.image):
        return f"its path {shown(record.image)} is none"
    for side in (record.height, record.width):
        if side is not None and (type(side) is not int or not 1 <= side <= MOST_PIXELS):
            return f"{shown(side)} is no height or width in pixels"
    label: Any = record.labels
    if task == "single-label" and not 0 <= label < classes:
        return f"label {shown(label)} is out of range, there are {classes} classes"
    if len(record.boxes) and not np.isfinite(record.boxes).all():
        return "a box has a corner that is no finite number"
    return None


def repeated_ids(records: Sequence[Record]) -> list[str]:
    """Return the ids that occur more than once, each once, in order."""
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for record in records:
        if record.id in seen:
            repeated[record.id] = None
        seen.add(record.id)
    return list(repeated)


def over_threads(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, unit: str, threads: int
) -> Iterator[Result]:
    """Yield function(item) for each item, in order. A progress bar shows if that takes longer than 2 seconds."""
    tasks = [items[n : n + TASK] for n in range(0, len(items), TASK)]
    pool = ThreadPoolExecutor(threads)
    try:
        with Progress(title, len(items), unit=unit, fleeting=True) as progress:
            for results in pool.map(lambda task: [function(item) for item in task], tasks):
                yield from results
                progress.update(len(results))
    finally:
        pool.shutdown(cancel_futures=True)


def _complete_record(record: Record) -> Record:
    length, height, width = record.image_bytes, record.height, record.width
    if height is None or width is None:
        length, height, width = measure_image(record.image)
    elif length is None:
        # Only annotations of image files know a size without a length.
        length = file_length(cast(str | os.PathLike[str], record.image))
    boxes = clip_boxes(record, height, width)
    return replace(record, image_bytes=length, height=height, width=width, boxes=boxes)


def clip_boxes(record: Record, height: int, width: int) -> np.ndarray:
    """Clip a record's boxes [M, 4] to the edges of its image. Raises BadInput if nothing of a box is left."""
    if not len(record.boxes):
        return record.boxes
    boxes = record.boxes.clip(0, np.array([width, height, width, height], np.float32))
    for box in record.boxes[~((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3]))][:1]:
        raise BadInput(
            f"image {record.image}: box {box.tolist()} (x0, y0, x1, y1) has no pixel of its {width}x{height}"
        )
    return boxes


def file_length(path: str | os.PathLike[str]) -> int:
    """Return the length of a file in bytes. Raises BadInput if there is no such file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BadInput(f"image not found: {path}") from None
    except OSError as error:
        raise BadInput(f"image {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"image {path} is not a file")
    return status.st_size
