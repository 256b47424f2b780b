"""What a machine can do to a command is one line with a remedy, and stops nothing that can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import featcache
from featcache.errors import LONGEST_LINE, BadInput, one_line

pytestmark = pytest.mark.process

LIMIT = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.{}, ({}, {})); "
MAIN = "from featcache.cli import main; main()"


def limited(kind, most, *words):
    """Run a command under a limit of the system's; return the CompletedProcess."""
    code = LIMIT.format(kind, most, most) + MAIN
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)


def is_one_line(done, *parts):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and all(part in lines[-1] for part in parts), done.stderr
    assert len(lines[-1]) < 500
    return True


@pytest.mark.parametrize("shell", [">&- 2>&-", "| true", "2>&1 | head -1"])
def test_dead_streams_stop_nothing(store, tmp_path, shell):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "probes:\n- {features: pooled, head: linear, loss: bce, epochs: 2, optimizer: {type: sgd, lr: [0.1, 1]}}\n"
    )
    words = f"{sys.executable} -m featcache train-probes --grid {grid} --store {store}"
    subprocess.run(f"{words} --run {tmp_path}/quiet", shell=True, check=True, capture_output=True)
    done = subprocess.run(
        ["bash", "-c", f"{words} --run {tmp_path}/run {shell}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        # Bars go on after the first line, so that there is something to say once the reader has gone.
        env=os.environ | {"FEATCACHE_PROGRESS": "bar"},
    )
    assert done.returncode == (141 if "|" in shell else 0), done.stderr
    for name in ("scores.csv", "history.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    assert featcache.verify(tmp_path / "run") == []


def test_a_full_disk_leaves_no_export(checkpoint, tmp_path):
    for suffix in (".pth", ".safetensors"):
        target = tmp_path / f"out{suffix}"
        assert is_one_line(limited("RLIMIT_FSIZE", 50_000, "export", checkpoint, "--to", target), "File too large")
        assert list(tmp_path.iterdir()) == []


def test_too_many_open_files_is_one_line(scenes, checkpoint, tmp_path):
    words = ("extract", "--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--size", 64, "--workers", 1)
    done = limited("RLIMIT_NOFILE", 12, *words, "--store", tmp_path / "s.zarr")
    assert done.returncode == 0 or is_one_line(done, "too many open files", "ulimit -n")


def test_a_bug_is_one_line_and_a_traceback_on_request(monkeypatch, tmp_path):
    code = "import featcache.store.verify as v; import featcache.probes.runs.verify as p\n"
    code += "def broken(*_): raise KeyError('what')\np.verify = broken\n" + MAIN
    start = [sys.executable, "-c", code, "verify", str(tmp_path)]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 70 and "Traceback" not in done.stderr and "--debug" in done.stderr
    done = subprocess.run([*start, "--debug"], capture_output=True, text=True)
    assert done.returncode == 70 and "KeyError: 'what'" in done.stderr and "Traceback" in done.stderr


def test_lines_stay_short_and_printable():
    error = BadInput(f"checkpoint /a/{'x' * 3000}/b.pth: \x1b[31mred\nsecond \ud800 line; run the same command again")
    assert len(error.message) <= LONGEST_LINE and error.message.isprintable()
    assert error.message.endswith("run the same command again") and error.message.startswith("checkpoint /a/xxx")
    assert one_line("short") == "short"
    many = BadInput("the grid has errors:", *map(str, range(100)))
    assert len(many.message.split("\n")) == 22 and many.message.endswith("... and 80 more")


@pytest.mark.slow
def test_ranks_without_their_launcher_end(store, tmp_path):
    """torchrun is killed at work: its ranks see that their parent is gone."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "probes:\n- {features: spatial, head: mlp, loss: bce, epochs: 100000, optimizer: {type: sgd, lr: 0.1}}\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "featcache"]
    words = ["train-probes", "--grid", str(grid), "--store", str(store), "--run", str(tmp_path / "run")]
    run = subprocess.Popen(
        [sys.executable, *launch, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: (tmp_path / "run/run.json").exists(), 120)
        ranks = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        assert len(ranks) == 2
        run.kill()
        until(lambda: not any(map(alive, ranks)), 60)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def test_numbers_beyond_a_machine_are_refused(scenes, checkpoint, tmp_path, command):
    words = ("extract", "--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--store", tmp_path / "s.zarr")
    for option, number in (("--seed", 10**26), ("--size", 10**30), ("--workers", 10**9), ("--views", 10**30)):
        code, _, err = command(*words, option, number)
        assert code == 2 and len(err.strip().splitlines()[-1]) < 500, (option, err)
    assert not (tmp_path / "s.zarr").exists()


def test_a_module_of_this_folder_shadows_no_package(tmp_path, monkeypatch, command):
    """And whatever a function of the user's does, it is one line."""
    monkeypatch.chdir(tmp_path)
    Path("safetensors.py").write_text("raise RuntimeError('shadowed')\n")
    Path("mynet.py").write_text("import sys\n\ndef leave():\n    sys.exit(0)\n\ndef number():\n    return 5\n")
    for arch, said in (("mynet:leave", "SystemExit"), ("sys:exit", "SystemExit"), ("mynet:number", "returns int")):
        code, _, err = command("layers", "random", "--arch", arch)
        assert code == 2 and said in err and "Traceback" not in err, err
    done = subprocess.run(["featcache", "layers", "random", "--arch", "mynet:number"], capture_output=True, text=True)
    assert "returns int" in done.stderr and "shadowed" not in done.stderr
