"""kill -9 and worse at any moment, then the same command: the same bytes. Real processes, real signals."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from extracting import SMALL_SHARDS, START, options, torchrun
from folders import SUPPORT, tree_hash
from processes import free_port, stop_group

import featcache
from featcache.errors import BadInput
from featcache.store.verify import verify

pytestmark = pytest.mark.process


def markers(path):
    return len(list(path.glob("commits/*/*.json")))


def run(words, **more):
    return subprocess.run([*START, *words], capture_output=True, text=True, **more)


def begin(words, **more):
    return subprocess.Popen([*START, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def wait_for(process, path, target):
    while markers(path) < target and process.poll() is None:
        time.sleep(0.001)


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def undisturbed(request, scenes, checkpoint, tmp_path_factory):
    """(suffix, hash, number of shards) of a store that nothing disturbed."""
    path = tmp_path_factory.mktemp("undisturbed") / f"s.{request.param}"
    assert run(options(scenes, checkpoint, path)).returncode == 0
    assert markers(path) > 8
    return request.param, tree_hash(path), markers(path)


def kill_often(scenes, checkpoint, folder, undisturbed, moments):
    suffix, whole, total = undisturbed
    path, chance, seen = folder / f"s.{suffix}", random.Random(0), []
    words = options(scenes, checkpoint, path, workers=1)
    for target in moments:
        process = begin(words)
        wait_for(process, path, target)
        # The first kill comes while the program starts.
        time.sleep(chance.uniform(0, 0.02 if target else 1))
        process.kill()
        process.communicate()
        seen.append(markers(path))
        if 0 < seen[-1]:
            assert all("missing" in finding.what for finding in verify(path)), "a marker is wrong"
        if seen[-1] < total:
            # Before the manifest is written there is a folder with nothing but a lock in it.
            with pytest.raises(BadInput, match="incomplete|not found|it has no manifest.json"):
                featcache.open_store(path)
        elif target < total:
            continue
    assert any(0 < count < total for count in seen), seen
    assert run(words).returncode == 0
    assert tree_hash(path) == whole


def test_kill_and_resume(scenes, checkpoint, tmp_path, undisturbed):
    total = undisturbed[2]
    kill_often(scenes, checkpoint, tmp_path, undisturbed, (0, 1, total // 4, total // 2))


@pytest.mark.slow
def test_kill_fifty_times(scenes, checkpoint, tmp_path, undisturbed):
    """Ten stores, each killed five times before it is whole."""
    total = undisturbed[2]
    for turn in range(10):
        folder = tmp_path / str(turn)
        folder.mkdir()
        chance = random.Random(turn)
        moments = sorted(chance.randrange(total) for _ in range(4))
        kill_often(scenes, checkpoint, folder, undisturbed, (0, *moments))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_stop_is_resumed(scenes, checkpoint, tmp_path, undisturbed, number, code):
    suffix, whole, total = undisturbed
    path = tmp_path / f"s.{suffix}"
    words = options(scenes, checkpoint, path, workers=1)
    process = begin(words)
    wait_for(process, path, 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said
    assert 2 <= markers(path) < total and not list(path.rglob("*.partial"))
    assert run(words).returncode == 0
    assert tree_hash(path) == whole


# The real program, sent a signal at the worst moment: while it asks a worker for the memory a batch lies in.
STOPPED_MID_BATCH = """
import os, signal, sys
from multiprocessing import connection
from featcache.cli import main
answer, reader, number = connection.answer_challenge, os.getpid(), int(sys.argv.pop())
def stop(*words):
    if os.getpid() == reader:
        os.kill(reader, number)
    answer(*words)
connection.answer_challenge = stop
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_while_a_batch_arrives_says_one_line(scenes, checkpoint, tmp_path, number, code):
    words = ["extract", *options(scenes, checkpoint, tmp_path / "s.zarr", workers=1), str(int(number))]
    result = subprocess.run([sys.executable, "-c", STOPPED_MID_BATCH, *words], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


def test_a_stop_before_the_first_shard_leaves_nothing(scenes, checkpoint, tmp_path):
    process = begin(options(scenes, checkpoint, tmp_path / "s.zarr"))
    while not (tmp_path / "s.zarr/manifest.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert markers(tmp_path / "s.zarr") or not (tmp_path / "s.zarr").exists()


def test_two_at_once_never_mix(scenes, checkpoint, tmp_path, undisturbed):
    suffix, whole, _ = undisturbed
    words = options(scenes, checkpoint, tmp_path / f"s.{suffix}")
    both = [begin(words), begin(words)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert any("waiting: another process" in text or "finished already" in text for text in said)
    assert tree_hash(tmp_path / f"s.{suffix}") == whole


@pytest.mark.parametrize("first", ["many", "one"])
def test_resume_with_another_world_size(scenes, checkpoint, tmp_path, first):
    words = options(scenes, checkpoint, tmp_path / "s.zarr")
    many, one = torchrun(4 if first == "many" else 2, words), [*START, *words]
    begun, other = (many, one) if first == "many" else (one, many)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(begun, start_new_session=True, **quiet)
    wait_for(process, tmp_path / "s.zarr", 3)
    stop_group(process)
    # torchrun's workers have sessions of their own; they must be gone before the store is looked at.
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)
    time.sleep(0.5)
    done = markers(tmp_path / "s.zarr")
    assert done >= 3
    finished = subprocess.run(other, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    # torchrun gives its processes one thread each, unless the environment says otherwise.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ if first == "many" else os.environ
    assert run(options(scenes, checkpoint, tmp_path / "whole.zarr"), env=environment).returncode == 0
    assert tree_hash(tmp_path / "s.zarr") == tree_hash(tmp_path / "whole.zarr")


def test_a_dead_rank_hangs_nobody(scenes, checkpoint, tmp_path):
    """Two ranks without torchrun to watch over them; the second dies with shards in its hands."""
    words = options(scenes, checkpoint, tmp_path / "s.zarr")
    impatient = SMALL_SHARDS.replace(
        "from featcache.cli", "import featcache.ranks as r; r.PATIENCE_SECONDS = 2; from featcache.cli"
    )
    dying = SMALL_SHARDS.replace(
        "from featcache.cli",
        "import os, featcache.extraction.fill as e; put, n = e.put_shard, [0]; "
        "e.put_shard = lambda *a: (n.append(0), put(*a))[1] if len(n) < 3 else os._exit(9); from featcache.cli",
    )
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, "extract", *words],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, code in enumerate((impatient, dying))
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 9], said
    assert "doing them here" in said[0]
    assert verify(tmp_path / "s.zarr") == []
    # In the ranks' own environment: a store records its threads, which OMP_NUM_THREADS chooses for all of them.
    assert run(options(scenes, checkpoint, tmp_path / "w.zarr")).returncode == 0
    assert tree_hash(tmp_path / "s.zarr") == tree_hash(tmp_path / "w.zarr")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 300 kB, or a skip where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up(scenes, checkpoint, small_disk, undisturbed):
    suffix, whole, _ = undisturbed
    words = options(scenes, checkpoint, small_disk / f"s.{suffix}")
    done = run(words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the disk has 0.00 GB free" in done.stderr
    # Room enough when it starts, but then others fill the disk.
    subprocess.run(["mount", "-o", "remount,size=2600k", small_disk], check=True)
    process = begin(words)
    wait_for(process, small_disk / f"s.{suffix}", 3)
    with open(small_disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "No space left on device" in said.splitlines()[-1], said
    assert not list(small_disk.rglob("*.partial")) and markers(small_disk / f"s.{suffix}") >= 3
    (small_disk / "ballast").unlink()
    assert run(words).returncode == 0
    assert tree_hash(small_disk / f"s.{suffix}") == whole


def test_a_read_only_disk(scenes, checkpoint, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run(options(scenes, checkpoint, small_disk / "s.zarr"))
    assert done.returncode == 2 and "Read-only file system" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# Dies, or gets an error, at the Nth thing that is done to the file system below the store.
FAULTS = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from faults import NOT_REACHED, in_child
from folders import tree_hash
from stores import write_store
from featcache.store.verify import verify

root, suffix, mode, stride = Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])

def write(path):
    write_store(path, rows=9)

whole = root / f"whole.{suffix}"
assert in_child(write, whole, 0, mode) == 0
expected, n = tree_hash(whole), 0
while True:
    n += stride
    path = root / f"{n}.{suffix}"
    code = in_child(write, path, n, mode)
    if code == NOT_REACHED:
        break
    # An error that the folder exists already, for one, may be overcome.
    assert code in ((-signal.SIGKILL,) if mode == "kill" else (5, 0)), (n, code)
    if (path / "manifest.json").exists():
        assert all("missing" in f.what for f in verify(path)), n
    if mode == "error":
        assert not list(path.rglob("*.partial")), n
    assert in_child(write, path, 0, mode) == 0
    assert tree_hash(path) == expected, n
print(n)
"""


@pytest.mark.parametrize("suffix", ["zarr", "hdf5"])
@pytest.mark.parametrize("mode", ["kill", "error"])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_every_file_operation(tmp_path, suffix, mode, stride):
    """At every third, and in the slow test at all."""
    words = [sys.executable, "-c", FAULTS, str(SUPPORT), str(tmp_path), suffix, mode, str(stride)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
