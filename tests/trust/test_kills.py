"""kill -9 at random moments of every command that writes, then the same command: the bytes of one that nothing disturbed.

Tests of signals, ranks and full disks: extraction/test_interruption.py. Here one process forks a child for each kill, so that
hundreds of them take a minute. Run as a program with tests/support on PYTHONPATH, this file does that: FOLDER SEED ROUNDS JOB ...
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trust
import yaml
from folders import SUPPORT, tree_hash
from processes import free_port, stop_group

import featcache
from featcache.cli import main
from featcache.finetuning import configuration
from featcache.probes.engine import sweep
from featcache.store import manifest

pytestmark = pytest.mark.process

SEED = 0
# What one round always does, and how many rounds of all jobs are slow.
SLICE, ROUNDS = ("extract zarr", "train", "train refit", "convert", "export"), 6
MOST_KILLS = 3
# A child that takes longer hangs.
MOST_SECONDS, HANGS = 60, 98
EXTRACT = "extract --backbone random --arch trust:network --dataset manifest --root {parts}/images/list.csv --size 32 --workers 0 --batch-size 8"
SEARCH = {
    "search": {"type": "halving", "factor": 2, "first": 0.25},
    "probes": [trust.GRID["probes"][0] | {"epochs": 8, "optimizer": {"type": "sgd", "lr": [0.1, 0.5, 1.0]}}],
}
TRAIN = {
    "probes": [trust.GRID["probes"][0] | {"epochs": 6, "keep": "best", "optimizer": {"type": "sgd", "lr": [0.1, 0.5]}}]
}
REFIT = TRAIN | {"refit": ["train", "val"]}
FOLDS = {"select": {"folds": 2}, "probes": [TRAIN["probes"][0] | {"keep": "last", "shots": 4, "draw": [0, 1]}]}

RECIPE = {
    "probes": [
        trust.GRID["probes"][0] | {"finetune": {"type": "full", "size": trust.SIZE, "ema": 0.9, "mixup": 0.5}},
    ]
}


def run_of(folder):
    return trust.run_files(folder / "run")


def maps_of(folder):
    return {name: (folder / "run" / name).read_bytes() for name in ("attribution.csv", "attribution.npz")}


# {job: (command line, what it writes, what has to be there before it)}
JOBS = {
    "extract zarr": (EXTRACT + " --store {folder}/s.zarr", lambda folder: tree_hash(folder / "s.zarr"), None),
    "extract hdf5": (EXTRACT + " --store {folder}/s.hdf5", lambda folder: tree_hash(folder / "s.hdf5"), None),
    "train": ("train-probes --grid {parts}/grid.yaml --store {parts}/s.zarr --run {folder}/run", run_of, None),
    "train streamed": (
        "train-probes --grid {parts}/grid.yaml --store {parts}/s.zarr --run {folder}/run --memory 0.000002", run_of, None,
    ),
    "train search": ("train-probes --grid {parts}/search.yaml --store {parts}/s.zarr --run {folder}/run", run_of, None),
    "train refit": ("train-probes --grid {parts}/refit.yaml --store {parts}/s.zarr --run {folder}/run", run_of, None),
    "train folds": ("train-probes --grid {parts}/folds.yaml --store {parts}/s.zarr --run {folder}/run", run_of, None),
    "convert": ("convert {parts}/s.zarr --out {folder}/o.hdf5", lambda folder: tree_hash(folder / "o.hdf5"), None),
    "convert zstd": (
        "convert {parts}/s.zarr --compression zstd --out {folder}/o.zarr", lambda folder: tree_hash(folder / "o.zarr"), None,
    ),
    "attribute": ("attribute --run {folder}/run", maps_of, "run"),
    "report": ("report --run {parts}/run --out {folder}/page.html", lambda folder: (folder / "page.html").read_text(), None),
    "export": (
        "export --run {parts}/run --probe {probe} --backbone random --arch trust:network --to {folder}/m.safetensors",
        lambda folder: (folder / "m.safetensors").read_bytes(), None,
    ),
    "finetune": (
        "finetune --backbone random --arch trust:network --dataset manifest --root {parts}/images/list.csv --recipe "
        "{parts}/recipe.yaml --run {folder}/run --workers 0",
        run_of, None,
    ),
    "repair": ("verify {folder}/s.zarr --repair", lambda folder: tree_hash(folder / "s.zarr"), "damaged"),
}  # fmt: skip


def write_parts(parts):
    """What the jobs start from."""
    (parts / "images").mkdir(parents=True)
    images = trust.write_images(parts / "images")
    (parts / "grid.yaml").write_text(yaml.safe_dump(trust.GRID))
    (parts / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, grid in {"search": SEARCH, "refit": REFIT, "folds": FOLDS}.items():
        (parts / f"{name}.yaml").write_text(yaml.safe_dump(grid))
    trust.quietly(lambda: trust.write_store(images, parts / "s.zarr"))
    trust.quietly(lambda: featcache.train_probes(trust.GRID, store=parts / "s.zarr", run=parts / "run"))
    return featcache.open_run(parts / "run").scores[0]["probe"]


def prepare(folder, parts, needs):
    folder.mkdir()
    if needs == "run":
        shutil.copytree(parts / "run", folder / "run")
    if needs == "damaged":
        shutil.copytree(parts / "s.zarr", folder / "s.zarr")
        for file in ("train/4.pooled/c/0/0", "val/labels/c/0/0", "commits/test/000000.json"):
            path = folder / "s.zarr" / file
            path.write_bytes(path.read_bytes()[:-9] + b"123456789")


def in_child(words, kill_after=None, kill_at=None):
    """Run a command in a child; kill it after so many seconds or at so many file operations. Return its exit code."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
        sys.argv, count = ["featcache", *words], [0]

        def hook(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.link") and "struck" in str(arguments[0]):
                count[0] += 1
                if count[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_at:
            sys.addaudithook(hook)
        try:
            main()
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else bool(stop.code))
        except BaseException:
            os._exit(99)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    for _ in range(100 * MOST_SECONDS):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HANGS


def finish(job, words, parts, folder):
    """The same command until it is done; a repair needs the extraction after it."""
    code = in_child(words)
    if job != "repair":
        return code == 0, code
    extract, *_ = JOBS["extract zarr"]
    code = in_child([word.format(parts=parts, folder=folder) for word in extract.split()])
    return code == 0, code


def strike(place, seed, rounds, jobs):
    """Kill each job in each round, and print what does not come out as if nothing had been; then the counts."""
    parts, kills, failures = place / "parts", 0, []
    probe = write_parts(parts)
    for job in jobs:
        line, content, needs = JOBS[job]
        whole = place / "struck" / f"{job} whole"
        whole.parent.mkdir(exist_ok=True)
        prepare(whole, parts, needs)
        words = [word.format(parts=parts, folder=whole, probe=probe) for word in line.split()]
        begun = time.monotonic()
        assert finish(job, words, parts, whole)[0], f"{job} fails undisturbed"
        seconds, expected = time.monotonic() - begun, content(whole)
        for number in range(rounds):
            chance, folder = random.Random(f"{seed} {job} {number}"), place / "struck" / f"{job} {number}"
            prepare(folder, parts, needs)
            words, moments = [word.format(parts=parts, folder=folder, probe=probe) for word in line.split()], []
            for _ in range(chance.randint(1, MOST_KILLS) if rounds > 1 else 1):
                at = chance.choice(("after", "at"))
                moment = chance.uniform(0, seconds) if at == "after" else chance.randint(1, 60)
                moments.append(f"{at} {moment:.4g}")
                kills += in_child(words, **{f"kill_{at}": moment}) == -signal.SIGKILL
            fine, code = finish(job, words, parts, folder)
            if not fine:
                failures.append(f"{job}, round {number}, killed {moments}: then exit {code}")
            elif content(folder) != expected:
                failures.append(f"{job}, round {number}, killed {moments}: OTHER BYTES")
            shutil.rmtree(folder)
    print(f"{kills} kills of {len(jobs)} jobs, {len(failures)} failures", *failures, sep="\n")
    return bool(failures) or not kills


def run_strikes(place, rounds, jobs):
    settings = ["env", f"PYTHONPATH={SUPPORT}", "OMP_NUM_THREADS=1"]
    words = [*settings, sys.executable, __file__, str(place), str(SEED), str(rounds), *jobs]
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}\nAgain: {' '.join(map(repr, words))}"


def test_kills_change_nothing(tmp_path):
    run_strikes(tmp_path, 1, SLICE)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_kills_change_nothing(tmp_path, job):
    run_strikes(tmp_path, ROUNDS, [job])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["zarr", "hdf5"])
def test_kills_of_two_processes_change_nothing(tmp_path, suffix):
    """torchrun with two ranks, all of them killed; then again, with two or with one."""
    write_parts(tmp_path / "parts")
    chance = random.Random(SEED)
    program = "import featcache.store.manifest as m; m.SHARD_BYTES, m.CHUNK_ROWS = 700, 2; from featcache.cli import main; main()"
    there = {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}

    def words(folder, ranks):
        line = EXTRACT.format(parts=tmp_path / "parts") + f" --store {folder}/s.{suffix}"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        return [
            sys.executable,
            *(launch + ["--no-python", sys.executable] if ranks > 1 else []),
            "-c",
            program,
            *line.split(),
        ]

    begun = time.monotonic()
    subprocess.run(words(tmp_path / "whole", 2), check=True, capture_output=True, env=os.environ | there)
    seconds = time.monotonic() - begun
    for number in range(4):
        folder = tmp_path / str(number)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words(folder, 2), start_new_session=True, env=os.environ | there, **quiet)
        time.sleep(chance.uniform(0.6, 1) * seconds)
        # The launcher; its ranks notice, or finish.
        stop_group(process)
        done = subprocess.run(words(folder, 1 + number % 2), capture_output=True, text=True, env=os.environ | there)
        assert done.returncode == 0, done.stderr
        assert tree_hash(folder / f"s.{suffix}") == tree_hash(tmp_path / "whole" / f"s.{suffix}")


if __name__ == "__main__":
    manifest.CHUNK_ROWS, manifest.SHARD_BYTES, sweep.SAVE_SECONDS = 2, 700, -1
    configuration.SAVE_SECONDS = -1
    sys.exit(strike(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
