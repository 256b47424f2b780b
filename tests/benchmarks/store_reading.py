"""The store against plain files, in one run: whole reads, shuffled batches, writing, opening, memory.

    python tests/benchmarks/store_reading.py

A float16 feature in both formats, numpy.memmap on a raw file, zarr-python and h5py on the same rows. The
files are warm in the page cache, so the figures compare readers and not the disk. Contestants take turns,
and the best time of each counts, which other programs disturb least (for writing, the median); ratios are to
numpy.memmap or to a plain file. Each table of epochs treats the batches of numpy.memmap as it treats ours.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import h5py
import numpy as np
import zarr

from featcache.datasets import Dataset, Record
from featcache.feature import Feature
from featcache.store import manifest as manifest_module
from featcache.store.folder import open_folder
from featcache.store.manifest import plan
from featcache.store.reader import open_store
from featcache.store.records import record_arrays, with_axes
from featcache.store.shard import Shard
from featcache.store.writer import create_store, put_shard

BATCH = 256
EPOCHS = 10
FEATURE = Feature("layer4", "pooled")


def write_store(path, rows, format):
    """Write rows as a store; return the seconds of its shards."""
    records = tuple(
        Record(id=f"{n:07d}", image=None, labels=0, height=1, width=1, image_bytes=0) for n in range(len(rows))
    )
    data = Dataset("bench", ("a",), "single-label", {"train": records})
    manifest = plan(
        identity={"bench": 1},
        rows={"train": len(rows)},
        shapes={FEATURE: rows.shape[1:]},
        dtype="float16",
        aliases={},
        classes=("a",),
        task=data.task,
        compute={"device": "cpu", "threads": 1, "batch_size": 32},
        storage={"format": format, "compression": None},
    )
    folder = open_folder(path)
    manifest = create_store(folder, manifest, {"train": with_axes(record_arrays(data, "train"))})
    started = time.perf_counter()
    for shard in range(manifest.shards("train")):
        first, end = manifest.rows_of("train", shard)
        ids = [r.id for r in records[first:end]]
        put_shard(Shard(folder, manifest, "train", shard), ids, {str(FEATURE): rows[first:end]})
    return time.perf_counter() - started


def write_raw(path, rows):
    """Write rows as a plain buffered file with fsync; return seconds."""
    started = time.perf_counter()
    with open(path, "wb") as file:
        file.write(rows.data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def compare(readers, repeats):
    """Run the readers in turn, `repeats` times after a warm-up; return {name: seconds of the best time}."""
    seconds = {name: [] for name in readers}
    for turn in range(repeats + 1):
        for name, read in readers.items():
            started = time.perf_counter()
            read()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: min(values) for name, values in seconds.items()}


def table(title, seconds, bytes_):
    """Print one comparison as Markdown."""
    print(f"\n| {title} | GB/s | against memmap |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {bytes_ / value / 1e9:.2f} | {seconds['numpy.memmap'] / value:.3f} |", flush=True)


def writing(folder, rows, repeats):
    """Both formats and a plain file in turn; the last ones stay."""
    seconds = {"plain file": [], "zarr": [], "hdf5": []}
    for turn in range(repeats):
        seconds["plain file"].append(write_raw(folder / "raw.bin", rows))
        for format in ("zarr", "hdf5"):
            if turn:
                open_folder(folder / f"bench.{format}").delete_all()
            seconds[format].append(write_store(folder / f"bench.{format}", rows, format))
    print("\n| sequential write with fsync | GB/s | against a plain file |\n| --- | --- | --- |")
    plain = statistics.median(seconds["plain file"])
    for name, values in seconds.items():
        value = statistics.median(values)
        print(f"| {name} | {rows.nbytes / value / 1e9:.2f} | {plain / value:.2f} |", flush=True)


def reading(folder, rows, batches, repeats):
    """Whole arrays and shuffled batches."""
    mapped = np.memmap(folder / "raw.bin", dtype=np.float16, mode="r", shape=rows.shape)
    plain = zarr.open_array(str(folder / "bench.zarr" / "train" / "layer4.pooled"), mode="r")
    ours = {f: (lambda f=f: open_store(folder / f"bench.{f}")["train"]["layer4:pooled"]) for f in ("zarr", "hdf5")}
    with h5py.File(folder / "bench.hdf5" / "index.h5") as file:
        h5 = file["train/layer4.pooled"]
        for opened in ours.values():
            assert np.array_equal(opened()[:], rows)
        whole = {
            "numpy.memmap": lambda: np.array(mapped),
            **{f"featcache {f} (opening included)": lambda o=o: o()[:] for f, o in ours.items()},
            "zarr-python": lambda: plain[:],
            "h5py": lambda: h5[:],
        }
        table("whole array", compare(whole, repeats), rows.nbytes)
        order = np.random.default_rng(1).permutation(len(rows))
        few, many = (order[: BATCH * n].reshape(n, BATCH) for n in (2, batches))
        arrays = {f: o() for f, o in ours.items()}
        shuffled = {
            "numpy.memmap": lambda: [mapped[b] for b in many],
            **{f"featcache {f}": lambda a=a: [a[b] for b in many] for f, a in arrays.items()},
        }
        slow = {
            "zarr-python": lambda: [plain.oindex[np.sort(b)] for b in few],
            "h5py": lambda: [h5[np.sort(b)] for b in few],
        }
        seconds = compare(shuffled, repeats)
        # Too slow for as many batches: fewer, scaled.
        seconds |= {name: s * len(many) / len(few) for name, s in compare(slow, 1).items()}
        table("shuffled batches of 256 rows, picked by number and not checked", seconds, many.size * rows[0].nbytes)
    epochs(folder, rows, repeats)


def epochs(folder, rows, repeats):
    """Shuffled batches, checked: the first epoch with all that it costs, and the mean of several of one opened store."""
    every = np.array_split(np.random.default_rng(1).permutation(len(rows)), -(-len(rows) // BATCH))

    def plain(use, count):
        mapped = np.memmap(folder / "raw.bin", dtype=np.float16, mode="r", shape=rows.shape)
        for _ in range(count):
            use(mapped[b] for b in every)

    def ours(use, count, format, memory):
        array = open_store(folder / f"bench.{format}")["train"]["layer4:pooled"]
        for epoch in range(count):
            use(array.batches(BATCH, shuffle=True, seed=(0, epoch), memory=memory))

    uses = {"all kept until the epoch ends": list, "each dropped before the next": lambda batches: deque(batches, 0)}
    for title, use in uses.items():
        for count, counted in ((1, "the first epoch"), (EPOCHS, f"mean of {EPOCHS} epochs")):
            contestants = {"numpy.memmap": lambda use=use, count=count: plain(use, count)}
            for format in ("zarr", "hdf5"):
                for share, memory in ((1, 1 << 30), (4, rows.nbytes // 4)):
                    name = f"featcache {format}" + (f", memory for 1/{share} of the rows" if share > 1 else "")
                    contestants[name] = lambda u=use, c=count, f=format, m=memory: ours(u, c, f, m)
            seconds = {name: s / count for name, s in compare(contestants, repeats).items()}
            table(f"{counted} of shuffled batches of {BATCH} rows, opened and checked, {title}", seconds, rows.nbytes)


def opening(folder):
    """Seconds to open a finished store of 1,000 shards, in each format."""
    rows = np.zeros((1000, 8), np.float16)
    whole, manifest_module.SHARD_BYTES, manifest_module.CHUNK_ROWS = manifest_module.SHARD_BYTES, 16, 1
    for format in ("zarr", "hdf5"):
        write_store(folder / f"many.{format}", rows, format)
    manifest_module.SHARD_BYTES, manifest_module.CHUNK_ROWS = whole, 256
    seconds = compare({f: (lambda f=f: open_store(folder / f"many.{f}")) for f in ("zarr", "hdf5")}, 5)
    print("\nopening a store of 1,000 shards: " + ", ".join(f"{f} {1e3 * s:.1f} ms" for f, s in seconds.items()))


def peak_memory(folder, bytes_):
    """Peak memory of a process that streams shuffled batches, over that of one that only opens the store."""
    for format in ("zarr", "hdf5"):
        base, *_ = streamed(folder / f"bench.{format}", 0)
        for memory in (bytes_ // 4, bytes_ + (32 << 20)):
            peak, own, mapped = streamed(folder / f"bench.{format}", memory)
            bound = (memory + (32 << 20) + 2 * BATCH * 4096) / 1e6
            print(
                f"streaming {bytes_ / 1e6:.0f} MB of {format} with memory={memory / 1e6:.0f} MB: peak "
                f"{(peak - base) / 1e6:.0f} MB above an open store (stated bound {bound:.0f} MB); at the end it holds "
                f"{own / 1e6:.0f} MB of its own and {mapped / 1e6:.0f} MB of mapped files"
            )


def streamed(path, memory):
    """Run `stream` in a process; return what it prints."""
    words = [sys.executable, __file__, "--stream", str(path), str(memory)]
    return map(int, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())


def stream(path, memory):
    """Read every batch and print bytes: the peak resident memory, and what is held at the end, as own and as mapped."""
    array = open_store(path)["train"]["layer4:pooled"]
    array[0]
    if memory:
        seen = sum(len(rows) for rows, _ in array.batches(BATCH, shuffle=True, memory=memory))
        assert seen == len(array)
    # Not getrusage: its peak is inherited from the parent.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(*(int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")))


def main():
    """Write the files, measure, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; by default a temporary folder")
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        stream(arguments.stream[0], int(arguments.stream[1]))
        return
    random = np.random.default_rng(0)
    rows = random.standard_normal((arguments.rows, arguments.width), dtype=np.float32).astype(np.float16)
    print(f"{platform.machine()}, numpy {np.__version__}, zarr {zarr.__version__}, h5py {h5py.__version__}")
    print(f"{arguments.rows} x {arguments.width} float16, {rows.nbytes / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        writing(folder, rows, arguments.repeats)
        reading(folder, rows, arguments.batches, arguments.repeats)
        opening(folder)
        peak_memory(folder, rows.nbytes)


if __name__ == "__main__":
    main()
