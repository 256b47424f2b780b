"""Remote stores when things go wrong under a reader: forks, objects that vanish, a server that dies."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid

import fsspec
import numpy as np
import pytest
from folders import SUPPORT, tree_hash
from stores import write_store

import featcache
from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.verify import verify


@pytest.fixture
def url():
    """A place of its own in fsspec's memory."""
    memory, bucket = fsspec.filesystem("memory"), uuid.uuid4().hex
    yield f"memory://{bucket}/x.zarr"
    memory.rm(f"/{bucket}", recursive=True)


@pytest.fixture(scope="module")
def environment():
    """For processes that shall find a real S3-compatible server with a bucket `features`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2", "SERVER": str(process.pid),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]),
    }  # fmt: skip
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield os.environ | settings
    finally:
        process.kill()
        process.wait()


def python(environment, *words):
    """Run Python in a process of its own: S3 libraries leave connections to the end of theirs."""
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=90
    )


FORK_AND_PICKLE = """
import pickle
from multiprocessing import get_context
import featcache, numpy, s3fs
from stores import write_store

s3fs.S3FileSystem().mkdir("features")
expected = write_store("s3://features/x.zarr")["layer4:pooled"]
for read_before in (False, True):
    array = featcache.open_store("s3://features/x.zarr")["train"]["pooled"]
    if read_before:
        array[:]
    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=lambda: theirs.send(array[3:20]))
    process.start()
    assert ours.poll(30) and numpy.array_equal(ours.recv(), expected[3:20])
    process.join(30)
    assert process.exitcode == 0 and numpy.array_equal(array[:], expected), "and the parent reads on"
    assert numpy.array_equal(pickle.loads(pickle.dumps(array))[5], expected[5])
"""

DYING_SERVER = """
import os, signal
import featcache
from featcache.errors import BadInput

array = featcache.open_store("s3://features/x.zarr")["train"]["pooled"]
array[0]
os.kill(int(os.environ["SERVER"]), signal.SIGKILL)
# The first row's shard was looked at before, the last row's was not.
for row in (1, 22):
    try:
        array[row]
    except BadInput as error:
        assert "Could not connect" in error.message and "repair" not in error.message, error.message
        assert error.message.startswith("s3://features/x.zarr") and chr(10) not in error.message, error.message
    else:
        raise AssertionError("rows from nowhere")
"""


@pytest.mark.process
def test_s3(environment, tmp_path):
    """Forked readers, conversion there and back, no bucket, and at last no server: that is no damage to repair."""
    done = python(environment, "-c", FORK_AND_PICKLE)
    assert done.returncode == 0, done.stderr
    write_store(tmp_path / "x.zarr")
    for source, target in (
        (tmp_path / "x.zarr", "s3://features/y.zarr"),
        ("s3://features/y.zarr", tmp_path / "z.zarr"),
    ):
        done = python(environment, "-m", "featcache", "convert", source, "--out", target)
        assert done.returncode == 0, done.stderr
    assert tree_hash(tmp_path / "z.zarr") == tree_hash(tmp_path / "x.zarr")
    done = python(environment, "-m", "featcache", "convert", tmp_path / "x.zarr", "--out", "s3://no-such-bucket/x.zarr")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "Error: s3://no-such-bucket/x.zarr: The specified bucket does not exist"
    done = python(environment, "-c", DYING_SERVER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_shard_that_goes_under_a_reader_is_no_nan(url, dtype):
    write_store(url, dtype=dtype)
    arrays = [featcache.open_store(url)["train"][name] for name in ("pooled", "spatial")]
    for array in arrays:
        assert np.isfinite(array[:]).all()
        open_folder(url).delete(array._source.name(1))
        for key in (slice(None), 9, [0, 15, 3], slice(12, 20)):
            with pytest.raises(BadInput, match="it is missing"):
                array[key]
        assert np.isfinite(array[:8]).all()


def other_dtype(data):
    return data.replace(b'"float16"', b'"int16"')


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("harm", [None, lambda data: b"{", lambda data: b"", other_dtype])
def test_damaged_array_metadata_is_named(url, harm, compression):
    """Local plain stores are read without it; zarr would follow it into other values."""
    write_store(url, compression=compression)
    folder, name = open_folder(url), "train/layer4.pooled/zarr.json"
    data = folder.read(name)
    assert json.loads(data)["data_type"] == "float16"
    folder.delete(name)
    if harm:
        with folder.writing(name) as file:
            file.write(harm(data))
    with pytest.raises(BadInput, match=f"(damaged|missing) file {url}/{name}; run featcache verify .* --repair"):
        featcache.open_store(url)["train"]["pooled"][:]
    assert [finding.where for finding in verify(url, repair=True)] == [name]
    write_store(url, compression=compression)
    assert verify(url) == [] and folder.read(name) == data


@pytest.mark.parametrize("place", ["local://x.zarr", "s3://", "memory:///"])
def test_urls_that_are_no_remote_place(place, command):
    code, _, err = command("verify", place)
    assert code == 2 and err.startswith(f"Error: {place}: give a local store as a plain path") and err.count("\n") == 1
