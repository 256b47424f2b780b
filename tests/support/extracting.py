"""The command `featcache extract` in a process of its own, on the small dataset and checkpoint of conftest.py."""

import sys

from processes import free_port

# Sides of the images.
SIZE = 64
# The real program with shards of a few rows, so that a small dataset has many.
SMALL_SHARDS = (
    "import featcache.store.manifest as m; m.SHARD_BYTES, m.CHUNK_ROWS = 40_000, 2; "
    "from featcache.cli import main; main()"
)
START = [sys.executable, "-c", SMALL_SHARDS, "extract"]


def options(scenes, checkpoint, store, **more):
    """Words of a command line that follow `extract`."""
    chosen = {
        "backbone": checkpoint, "dataset": "voc", "root": scenes, "store": store, "size": SIZE, "workers": 0, "batch-size": 8,
    } | more  # fmt: skip
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def torchrun(ranks, words):
    """The command line of an extraction by so many ranks."""
    script = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    # Threads change the last bits of some networks, so the store goes on with those it was begun with.
    return [sys.executable, *script, "--no-python", *START, *words]
