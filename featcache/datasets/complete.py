"""From the records as a layout lists them to complete ones: sizes measured, boxes and ids checked."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from featcache.datasets.image import measure_image
from featcache.errors import BadInput

# Threads, since they wait for the disk. A task is a run of images, for one would be all overhead.
THREADS = 16
TASK = 64


def completed(dataset):
    """Return the dataset with file and pixel sizes in every record and its boxes clipped to the image.

    Reads the header of every image whose size no annotation gives, in threads. Raises BadInput for an image that
    is missing or has no header, for an id that comes twice, and for a box that lies outside its image.
    """
    splits = {}
    for split, records in dataset.splits.items():
        for image_id in repeated_ids(records)[:1]:
            raise BadInput(f"{dataset.name}, split {split}: id {image_id!r} comes twice")
        words = f"sizes of {split}"
        splits[split] = tuple(over_threads(_complete_record, records, words, "img", THREADS))
    return replace(dataset, splits=splits)


def repeated_ids(records):
    """Ids that come more than once, each once, in order."""
    seen, repeated = set(), {}
    for record in records:
        if record.id in seen:
            repeated[record.id] = None
        seen.add(record.id)
    return list(repeated)


def over_threads(function, items, words, unit, threads):
    """Yield function(item) for each item, in order; a progress bar shows when it takes longer than 2 seconds."""
    tasks = [items[n : n + TASK] for n in range(0, len(items), TASK)]
    pool = ThreadPoolExecutor(threads)
    try:
        with tqdm(total=len(items), desc=words, unit=unit, delay=2, leave=False) as progress:
            for results in pool.map(lambda task: [function(item) for item in task], tasks):
                yield from results
                progress.update(len(results))
    finally:
        pool.shutdown(cancel_futures=True)


def _complete_record(record):
    length, height, width = record.image_bytes, record.height, record.width
    if height is None or width is None:
        length, height, width = measure_image(record.image)
    elif length is None:
        length = file_length(record.image)
    boxes = clip_boxes(record, height, width)
    return replace(record, image_bytes=length, height=height, width=width, boxes=boxes)


def clip_boxes(record, height, width):
    """A record's boxes [M, 4] without what hangs over the edges of its image. Raises BadInput if nothing is left."""
    if not len(record.boxes):
        return record.boxes
    boxes = record.boxes.clip(0, np.array([width, height, width, height], np.float32))
    for box in record.boxes[~((boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3]))][:1]:
        raise BadInput(
            f"image {record.image}: box {box.tolist()} (x0, y0, x1, y1) has no pixel of its {width}x{height}"
        )
    return boxes


def file_length(path):
    """Length of a file in bytes. Raises BadInput if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise BadInput(f"image not found: {path}") from None
