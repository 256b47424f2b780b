"""Reading a store: featcache against numpy.memmap, zarr-python and h5py on the same rows, in one run.

    python tests/benchmarks/store_reading.py

Reads the whole of a float16 feature, and shuffled batches of 256 rows. The files are warm in the page
cache, so the figures compare readers and not the disk. Medians; ratios are to numpy.memmap.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import zarr

from featcache.datasets import Dataset, Record
from featcache.feature import Feature
from featcache.store.manifest import plan
from featcache.store.reader import open_store
from featcache.store.writer import create_store, put_shard

BATCH = 256


def write_all(folder, rows):
    """Write the same rows as a store, a raw file and an HDF5 file; return seconds for store and raw file."""
    none = np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, bool)
    records = tuple(Record(f"{n:07d}", None, 0, 1, 1, 0, *none) for n in range(len(rows)))
    data = Dataset("bench", ("a",), "single-label", {"train": records})
    feature = Feature("layer4", "pooled")
    manifest = plan({"bench": 1}, {"train": len(rows)}, {feature: rows.shape[1:]}, "float16", {}, ("a",), data.task, 32)
    path = folder / "bench.zarr"
    create_store(path, manifest, data)
    started = time.perf_counter()
    for shard in range(manifest.shards("train")):
        first, end = manifest.rows_of("train", shard)
        put_shard(path, manifest, "train", shard, [r.id for r in records[first:end]], {str(feature): rows[first:end]})
    store_seconds = time.perf_counter() - started
    started = time.perf_counter()
    with open(folder / "raw.bin", "wb") as file:
        file.write(rows.data)
        file.flush()
        os.fsync(file.fileno())
    raw_seconds = time.perf_counter() - started
    with h5py.File(folder / "bench.h5", "w") as file:
        file.create_dataset("x", data=rows)
    return path, store_seconds, raw_seconds


def compare(readers, repeats):
    """Run the readers in turn, `repeats` times; return {name: median seconds}."""
    seconds = {name: [] for name in readers}
    for turn in range(repeats + 1):
        for name, read in readers.items():
            started = time.perf_counter()
            read()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title, seconds, bytes_):
    """Print one comparison as Markdown."""
    print(f"\n| {title} | GB/s | against memmap |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {bytes_ / value / 1e9:.2f} | {seconds['numpy.memmap'] / value:.3f} |", flush=True)


def main():
    """Write the files, measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; by default a temporary folder")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    rows = random.standard_normal((arguments.rows, arguments.width), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        path, store_seconds, raw_seconds = write_all(folder, rows)
        print(f"{platform.machine()}, numpy {np.__version__}, zarr {zarr.__version__}, h5py {h5py.__version__}")
        print(f"{arguments.rows} x {arguments.width} float16, {rows.nbytes / 1e6:.0f} MB")
        print(
            f"write: store {rows.nbytes / store_seconds / 1e9:.2f} GB/s, {raw_seconds / store_seconds:.2f} of a plain file with fsync"
        )
        mapped = np.memmap(folder / "raw.bin", dtype=np.float16, mode="r", shape=rows.shape)
        plain = zarr.open_array(str(path / "train" / "layer4.pooled"), mode="r")
        with h5py.File(folder / "bench.h5") as file:
            ours = lambda: open_store(path)["train"]["layer4:pooled"]  # noqa: E731
            assert np.array_equal(ours()[:], rows)
            whole = {
                "numpy.memmap": lambda: np.array(mapped),
                "featcache (opening included)": lambda: ours()[:],
                "zarr-python": lambda: plain[:],
                "h5py": lambda: file["x"][:],
            }
            table("whole array", compare(whole, arguments.repeats), rows.nbytes)
            order = random.permutation(len(rows))
            few, many = (order[: BATCH * n].reshape(n, BATCH) for n in (2, arguments.batches))
            opened = ours()
            shuffled = {
                "numpy.memmap": lambda: [mapped[b] for b in many],
                "featcache": lambda: [opened[b] for b in many],
            }
            slow = {
                "zarr-python": lambda: [plain.oindex[np.sort(b)] for b in few],
                "h5py": lambda: [file["x"][np.sort(b)] for b in few],
            }
            seconds = compare(shuffled, arguments.repeats)
            # Too slow for as many batches: fewer, scaled.
            seconds |= {name: s * len(many) / len(few) for name, s in compare(slow, 2).items()}
            table("shuffled batches of 256 rows", seconds, many.size * rows[0].nbytes)


if __name__ == "__main__":
    main()
