"""Stores at a URL: in memory, and on a real S3-compatible server."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import fsspec
import numpy as np
import pytest
import yaml
from extracting import SMALL_SHARDS, options
from folders import tree_hash
from stores import write_store

import featcache
from featcache.errors import BadInput
from featcache.store.verify import verify

GRID = {
    "splits": {"train": "train", "val": "val", "test": "test"},
    "probes": [{"name": "linear", "features": "last:pooled", "head": "linear", "loss": "bce", "epochs": 2,
                "optimizer": {"type": "sgd", "lr": 0.1}}],
}  # fmt: skip


@pytest.fixture
def url():
    """A place of its own in fsspec's memory."""
    place = f"memory://{uuid.uuid4().hex}/x.zarr"
    yield place
    if fsspec.filesystem("memory").exists(place):
        fsspec.filesystem("memory").rm(place, recursive=True)


@pytest.mark.parametrize("compression", [None, "blosc"])
def test_memory_there_and_back(tmp_path, url, compression):
    write_store(tmp_path / "x.zarr", compression=compression)
    features = write_store(url, compression=compression)
    train = featcache.open_store(url)["train"]
    for name, rows in features.items():
        assert np.array_equal(train[name][:], rows) and np.array_equal(train[name][[22, 3, 3]], rows[[22, 3, 3]])
    assert verify(url) == [] and train.boxes[5][0].tolist() == [[5.0] * 4] * 2
    featcache.convert(url, out=tmp_path / "back.zarr", compression=compression)
    assert tree_hash(tmp_path / "back.zarr") == tree_hash(tmp_path / "x.zarr")


def test_what_is_lost_is_no_nan(url):
    write_store(url)
    memory, shard = fsspec.filesystem("memory"), f"{url}/train/layer4.spatial/c/1/0/0/0"
    whole = memory.cat_file(shard)
    for harm in (lambda: memory.pipe_file(shard, whole[:-1]), lambda: memory.rm_file(shard)):
        harm()
        with pytest.raises(BadInput, match="damaged shard file"):
            featcache.open_store(url)["train"]["spatial"][:]
    (finding,) = verify(url, repair=True)
    assert "shard 1 (rows 8 to 15)" in finding.what
    with pytest.raises(BadInput, match="incomplete"):
        featcache.open_store(url)
    write_store(url)
    assert verify(url) == [] and memory.cat_file(shard) == whole


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("memory://nothing/here.zarr", "store not found"),
        ("foo://x", "foo"),
        ("s3://x/y.hdf5", "a store at a URL is Zarr"),
    ],
)
def test_wrong_places(scenes, checkpoint, command, place, message):
    if place.startswith("s3"):
        code, _, err = command("extract", *options(scenes, checkpoint, place))
    else:
        code, _, err = command("verify", place)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Environment of a real S3-compatible server with a bucket `features`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "wb")
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    environment = dict.fromkeys(names, "testing") | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    make = "import s3fs; s3fs.S3FileSystem().mkdir('features')"
    subprocess.run([sys.executable, "-c", make], check=True, env=os.environ | environment)
    yield os.environ | environment
    process.kill()
    process.wait()
    log.close()


def run(words, environment):
    start = [sys.executable, "-c", SMALL_SHARDS]
    return subprocess.run([*start, *map(str, words)], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.process
def test_s3_killed_and_resumed(scenes, checkpoint, tmp_path, server):
    """The same objects as the files of a local store, after a kill in the middle."""
    place = "s3://features/voc.zarr"
    words = ["extract", *options(scenes, checkpoint, place)]
    # Killed while it writes its fourth shard.
    dying = SMALL_SHARDS.replace(
        "from featcache.cli",
        "import os, featcache.extraction.fill as e; put, n = e.put_shard, [0]; "
        "e.put_shard = lambda *a: (n.append(0), put(*a))[1] if len(n) < 4 else os.kill(os.getpid(), 9); "
        "from featcache.cli",
    )
    killed = subprocess.run([sys.executable, "-c", dying, *map(str, words)], env=server, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    done = run(["verify", place], server)
    assert done.returncode == 1 and "is missing" in done.stdout and "Traceback" not in done.stderr
    listing = "import s3fs; print(len(s3fs.S3FileSystem().find('features/voc.zarr/commits')))"
    there = subprocess.run([sys.executable, "-c", listing], env=server, capture_output=True, text=True, check=True)
    assert int(there.stdout) > 0, "killed in the middle"
    done = run(words, server)
    assert done.returncode == 0, done.stderr
    assert run(["extract", *options(scenes, checkpoint, tmp_path / "voc.zarr")], server).returncode == 0
    (tmp_path / "voc.zarr/commits/lock").unlink()
    copy = "import sys, s3fs; s3fs.S3FileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"
    subprocess.run([sys.executable, "-c", copy, "features/voc.zarr", str(tmp_path / "copy")], check=True, env=server)
    assert tree_hash(tmp_path / "copy") == tree_hash(tmp_path / "voc.zarr")
    assert run(["verify", place], server).returncode == 0
    assert "layer4:pooled" in run(["inspect", place], server).stdout
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(GRID))
    done = run(["train-probes", "--grid", grid, "--store", place, "--run", tmp_path / "run"], server)
    assert done.returncode == 0 and (tmp_path / "run/scores.csv").exists(), done.stderr


@pytest.mark.process
def test_s3_that_does_not_answer(scenes, checkpoint, server):
    done = run(["verify", "s3://no-such-bucket-here/x.zarr"], server)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no-such-bucket-here" in done.stderr
    done = run(["extract", *options(scenes, checkpoint, "s3://no-such-bucket-here/x.zarr")], server)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "bucket" in done.stderr.splitlines()[-1]
    dead = server | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = run(["verify", "s3://features/voc.zarr"], dead)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "127.0.0.1:9" in done.stderr
