"""All maps of an attribution as a Zarr group in the run, which any Zarr library reads: `featcache attribute --save-maps`."""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.atomic import remove
from featcache.attribution.pieces import Piece, Pieces
from featcache.attribution.task import Task
from featcache.errors import BadInput
from featcache.probes.runs.run_file import SAVED_MAPS, checksum

# Bytes of a chunk, which is read as a whole, and of a shard, which is a file; before compression. run.json lists the files.
CHUNK_BYTES, SHARD_BYTES = 1 << 20, 64 << 20


def in_half_precision(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps [N, S, S] divided by their largest absolute value, as float16, and these values, float32 [N].

    Gradients can be so small that float16 would lose them. The scale of a map of zeros is 1.
    """
    scales = maps.flatten(1).abs().amax(1)
    scales = torch.where(scales > 0, scales, 1.0)
    return (maps / scales[:, None, None]).half(), scales


@contextmanager
def opened(task: Task, pieces: Pieces, number: int) -> Iterator[np.ndarray | None]:
    """Yield the array float16 [M, P, T, S, S] on disk for the maps of a piece, or None if maps are not saved."""
    if not task.settings.save_maps:
        yield None
        return
    size, path = task.source.preprocessing.size, pieces.maps_file(number)
    shape = (len(task.methods), len(task.explained), len(task.pieces[number]), size, size)
    remove(path)
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    yield array
    array.flush()


def read_map(pieces: Pieces, number: int, piece: Piece, target: int) -> torch.Tensor:
    """Read the saved maps of a target of a piece: float32 [M, P, S, S]."""
    halved = np.load(pieces.maps_file(number), mmap_mode="r")[:, :, target]
    return torch.from_numpy(halved.astype(np.float32)) * _scales(piece)[:, :, target, None, None]


def bytes_of(task: Task) -> int:
    """Return how many bytes all maps take as float16."""
    pairs, size = sum(map(len, task.pieces)), task.source.preprocessing.size
    return 2 * pairs * len(task.explained) * len(task.methods) * size**2


def describe(task: Task) -> str:
    """Say how large the maps get, in a line for people. Raises BadInput if the disk cannot hold them."""
    each = sum(map(len, task.pieces)) * len(task.explained)
    size, needed = task.source.preprocessing.size, bytes_of(task)
    free = shutil.disk_usage(task.run.path).free
    # Until all pieces are put together, they are there twice.
    if 2 * needed > free:
        raise BadInput(
            f"--save-maps: the maps take up to {2 * needed / 1e9:.1f} GB in {task.run.path}, where {free / 1e9:.1f} GB are "
            "free; take fewer probes or methods, or --limit"
        )
    return (
        f"maps to save: {len(task.methods)} x {each:,} of {size} x {size} pixels, {needed / 1e6:,.1f} MB as float16 before "
        f"compression (up to twice that while they are put together): {task.run.path / SAVED_MAPS}"
    )


def array_name(label: str) -> str:
    """Return the name of a method's array, in which colons and the like become dashes."""
    return re.sub(r"[^\w.=-]", "-", label)


def write_maps(task: Task, pieces: Pieces, finished: Sequence[Piece], facts: dict[str, Any]) -> Path:
    """Put the maps of all pieces together, in the folder of the pieces. Returns the Zarr group's path.

    facts: what the group's attributes say of the attribution, as attribution.json does. The rows of every array are
    those of attribution.csv for one method, in order.
    """
    import zarr
    from zarr.codecs import ZstdCodec

    source, size = task.source, task.source.preprocessing.size
    targets = [target for piece in task.pieces for target in piece]
    images = list(dict.fromkeys(target.row for target in targets))
    at = {row: number for number, row in enumerate(images)}
    attributes = {
        "attribution": facts,
        "probes": [f"{one.probe} ({one.note})" if one.note else one.probe for one in task.explained],
        "ids": [source.id_of(row) for row in images],
        "classes": list(source.split.store.classes),
    }
    path = pieces.folder / SAVED_MAPS
    remove(path)
    root = zarr.create_group(path, attributes=attributes)
    order = [(probe, target) for piece in task.pieces for probe in range(len(task.explained)) for target in piece]
    columns = {
        "probe": [probe for probe, _ in order],
        "image": [at[target.row] for _, target in order],
        "class": [target.label for _, target in order],
    }
    for name, values in columns.items():
        root.create_array(name, data=np.array(values, np.int32), dimension_names=("row",))
    each = 2 * size**2
    chunk = max(1, min(len(order), CHUNK_BYTES // each))
    shard = chunk * max(1, min(math.ceil(len(order) / chunk), SHARD_BYTES // (chunk * each)))
    for number, method in enumerate(task.methods):
        name = array_name(method.label)
        scales = torch.cat([_scales(piece)[number].flatten() for piece in finished]).numpy()
        root.create_array(f"{name}.scale", data=scales, dimension_names=("row",))
        array = root.create_array(
            name,
            shape=(len(order), size, size),
            chunks=(chunk, size, size),
            shards=(shard, size, size),
            dtype=np.float16,
            compressors=[ZstdCodec(level=3)],
            dimension_names=("row", "y", "x"),
            attributes={"method": method.label},
        )
        for start, rows in _shards(pieces, number, shard):
            array[start : start + len(rows)] = rows
    return path


def _scales(piece: Piece) -> torch.Tensor:
    """Return the scales of a piece whose maps are saved."""
    if piece.scales is None:
        raise ValueError("the maps of this piece were not saved")
    return piece.scales


def _shards(pieces: Pieces, method: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows float16 [n, S, S]) of a method's maps of all pieces, `count` rows at a time."""
    held, start = list[np.ndarray](), 0
    for number in range(pieces.count):
        maps = np.load(pieces.maps_file(number), mmap_mode="r")[method]
        held.append(maps.reshape(math.prod(maps.shape[:2]), *maps.shape[2:]))
        while sum(map(len, held)) >= count:
            rows = np.concatenate(held)
            yield start, rows[:count]
            held, start = [rows[count:]], start + count
    if sum(map(len, held)):
        yield start, np.concatenate(held)


def checksums(folder: Path) -> dict[str, dict[str, int]]:
    """Return {name in the run: entry in run.json} for the files of a Zarr group."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{SAVED_MAPS}/{path.relative_to(folder).as_posix()}": checksum(path.read_bytes()) for path in files}
