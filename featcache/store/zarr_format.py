"""A store as Zarr v3: one file per feature and shard, written and mapped without zarr-python.

A shard file is its inner chunks one after another, each followed by the crc32c of its bytes, then
the index (offset and length of every inner chunk, uint64) and the crc32c of the index.
"""

import json
import math
import mmap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from featcache.errors import BadInput
from featcache.store.additions import part_of
from featcache.store.dtype import STORED, hole
from featcache.store.folder import Folder
from featcache.store.manifest import FeatureSpec, Manifest, feature_of
from featcache.store.manifest_fields import COMPRESSIONS
from featcache.store.records import AxedArrays

SUFFIX = ".zarr"
CRC_BYTES = 4
ABSENT = 2**64 - 1
ZSTD_LEVEL = 3
BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 5}


def shard_name(split: str, feature: str, number: int, axes: int) -> str:
    """Return the name of a shard's file of a feature.

    number: of the shard within its split. axes: how many the array has, rows included.
    """
    return "/".join([split, feature_of(feature).folder, "c", str(number), *["0"] * (axes - 1)])


def metadata_files(
    manifest: Manifest, arrays: Mapping[str, AxedArrays], parts: Sequence[Manifest] = ()
) -> dict[str, bytes]:
    """Return {name: bytes} of all Zarr metadata and of the small arrays.

    arrays: the small arrays of each split and view. parts: those of the store, if it has grown; manifest is then all of
    them merged.
    """
    import zarr
    from zarr.codecs import Crc32cCodec

    files: dict[str, Any] = {}
    attributes = {"id": manifest.id, "classes": manifest.classes, "identity": manifest.identity}
    root = zarr.create_group(zarr.storage.MemoryStore(files), attributes={"featcache": attributes})
    for split in manifest.splits:
        group = root.create_group(split)
        for name, (array, axes) in arrays[split].items():
            # A chunk may not be empty, an array may.
            chunks = tuple(max(size, 1) for size in array.shape)
            group.create_array(
                name,
                data=array,
                chunks=chunks,
                compressors=[Crc32cCodec()],
                dimension_names=axes,
                # zarr-python would leave out a chunk of nothing but zeros.
                config={"write_empty_chunks": True},
            )
        for name, spec in manifest.features.items():
            feature, row = feature_of(name), tuple(spec["shape"])
            part = part_of(parts or [manifest], split, name)
            group.create_array(
                feature.folder,
                shape=(part.splits[split]["rows"], *row),
                shards=(part.splits[split]["shard_rows"], *row),
                chunks=(part.features[name]["chunk_rows"], *row),
                dtype=STORED[spec["dtype"]],
                fill_value=hole(spec["dtype"]),
                compressors=[*_zarr_codecs(manifest.storage["compression"], spec["dtype"]), Crc32cCodec()],
                dimension_names=("row", *feature.axes_of(row)),
                attributes={"dtype": spec["dtype"]},
            )
    with warnings.catch_warnings():
        # zarr-python warns that consolidated metadata is not in the v3 specification. Readers that do not know it ignore
        # it, and the others open the store without listing folders.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(root.store)
    return {name: files[name].to_bytes() for name in sorted(files)}


def _zarr_codecs(compression: str | None, dtype: str) -> list[Any]:
    from zarr.codecs import BloscCodec, ZstdCodec

    if compression == "zstd":
        return [ZstdCodec(level=ZSTD_LEVEL)]
    if compression == "blosc":
        return [BloscCodec(typesize=STORED[dtype].itemsize, shuffle="bitshuffle", **BLOSC)]
    return []


def _compressor(compression: str | None) -> Callable[[np.ndarray], Any]:
    """Return a function from the array of a chunk to a buffer of its bytes, compressed."""
    if compression == "zstd":
        from numcodecs.zstd import Zstd

        return Zstd(level=ZSTD_LEVEL).encode
    if compression == "blosc":
        from numcodecs.blosc import BITSHUFFLE, Blosc

        return Blosc(shuffle=BITSHUFFLE, **BLOSC).encode
    return lambda chunk: chunk.reshape(-1).view(np.uint8)


def write_shard(file: BinaryIO, rows: np.ndarray, spec: FeatureSpec, shard_rows: int, compression: str | None) -> int:
    """Write rows [n, ...], as they are stored, as one shard. Returns 0, the offset of the first row.

    The last inner chunk is padded with NaN; inner chunks beyond the rows are absent.
    """
    encode = _compressor(compression)
    chunk_rows = spec["chunk_rows"]
    index = np.full((shard_rows // chunk_rows, 2), ABSENT, dtype="<u8")
    offset = 0
    for number, start in enumerate(range(0, len(rows), chunk_rows)):
        chunk = rows[start : start + chunk_rows]
        if len(chunk) < chunk_rows:
            padded = np.full((chunk_rows, *rows.shape[1:]), hole(spec["dtype"]), dtype=rows.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        data = encode(np.ascontiguousarray(chunk))
        file.write(data)
        file.write(crc_of(data).to_bytes(CRC_BYTES, "little"))
        length = len(data) + CRC_BYTES
        index[number] = offset, length
        offset += length
    file.write(index.tobytes())
    file.write(crc_of(index).to_bytes(CRC_BYTES, "little"))
    return 0


def shard_bytes(spec: FeatureSpec, shard_rows: int, rows: int) -> int:
    """Return the length of the file of a shard with so many rows, if it is not compressed."""
    chunk_rows = spec["chunk_rows"]
    chunk = chunk_rows * math.prod(spec["shape"]) * STORED[spec["dtype"]].itemsize + CRC_BYTES
    return -(-rows // chunk_rows) * chunk + shard_rows // chunk_rows * 16 + CRC_BYTES


def crc_of(data: Any) -> int:
    """Return the crc32c of a buffer, or of an array's bytes."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        # google_crc32c refuses a buffer that could change meanwhile.
        data.flags.writeable = False
    crc: int = google_crc32c.value(data)
    return crc


def view_shard(data: bytes | mmap.mmap, offset: int, spec: FeatureSpec, shard_rows: int, rows: int) -> np.ndarray:
    """View the bytes of an uncompressed shard file as [chunks, chunk_rows, ...]; the last chunk may hold padding.

    offset: of the first row, 0 in this format. Raises ValueError if the index is not the one that our writer makes.
    """
    index, chunk_rows, dtype = read_index(data, spec, shard_rows), spec["chunk_rows"], STORED[spec["dtype"]]
    stride = chunk_rows * int(np.prod(spec["shape"])) * dtype.itemsize + CRC_BYTES
    present = -(-rows // chunk_rows)
    expected = np.full_like(index, ABSENT)
    expected[:present, 0] = np.arange(present) * stride
    expected[:present, 1] = stride
    if not np.array_equal(index, expected):
        raise ValueError("its index does not fit its rows")
    row_strides = np.empty((chunk_rows, *spec["shape"]), dtype=dtype).strides
    return np.ndarray((present, chunk_rows, *spec["shape"]), dtype, buffer=data, strides=(stride, *row_strides))


def read_index(data: bytes | mmap.mmap, spec: FeatureSpec, shard_rows: int) -> np.ndarray:
    """Return the index of a shard file: offset and length of each chunk, uint64 [chunks, 2].

    Raises ValueError if it is damaged.
    """
    entries = shard_rows // spec["chunk_rows"]
    start = len(data) - entries * 16 - CRC_BYTES
    if start < 0:
        raise ValueError("it is too short for its index")
    index = np.frombuffer(data, dtype="<u8", count=entries * 2, offset=start)
    if crc_of(index) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("its index is damaged")
    return index.reshape(entries, 2)


def bad_chunks(data: bytes, spec: FeatureSpec, shard_rows: int) -> list[int]:
    """Return the numbers of the chunks of a shard file, compressed or not, that do not fit their own checksums.

    Raises ValueError if the index is damaged.
    """
    index = read_index(data, spec, shard_rows).tolist()
    chunks = [data[offset : offset + length] for offset, length in index if offset != ABSENT]
    crcs = [google_crc32c.value(chunk[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") for chunk in chunks]
    return [n for n, (chunk, crc) in enumerate(zip(chunks, crcs, strict=True)) if chunk[-CRC_BYTES:] != crc]


def read_array(read: Callable[[str], bytes], split: str, name: str) -> np.ndarray:
    """Read one of the small arrays: a single chunk with its crc32c. Raises ValueError if it is damaged.

    read: returns the bytes of a file of the store.
    """
    described = json.loads(read(f"{split}/{name}/zarr.json"))
    shape, dtype = tuple(described["shape"]), np.dtype(described["data_type"])
    if 0 in shape:
        return np.empty(shape, dtype)
    data = read("/".join([split, name, "c", *["0"] * len(shape)]))
    if google_crc32c.value(data[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
        raise ValueError("its checksum does not fit")
    return np.frombuffer(data[:-CRC_BYTES], dtype.newbyteorder("<")).reshape(shape).copy()


def check_place(folder: Folder, compression: str | None) -> None:
    """Raise BadInput for an unknown compression. Any place will do."""
    known = COMPRESSIONS["zarr"]
    if compression not in known:
        raise BadInput(f"unknown compression {compression!r} (known: {', '.join(name or 'none' for name in known)})")
