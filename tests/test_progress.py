"""What commands tell while they work: lines of a log, JSON, bars on a terminal, the bottleneck, and nothing in quiet."""

import json
import os
import re
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from extracting import options

from featcache import progress
from featcache.extraction import fill
from featcache.extraction.images import Images
from featcache.progress import Progress, mode, say

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d extract: \d+ of 20 img \(\d+%\)(?: in \S+)?, \S+ img/s(?:, ETA \S+)?"
    r"(?:, bottleneck: (?:decode|forward|write) \(\d+%\))?"
)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """Nothing chosen by the environment."""
    monkeypatch.delenv(progress.VARIABLE, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock.now."""
    hand = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: hand.now))
    return hand


def work(clock, **more):
    """A hundred seconds of work that decodes for 30, then computes: two lines on the way, and one at the end."""
    with Progress("extract", 1000, unit="img", **more) as told:
        told.phase("decode")
        clock.now += 30
        told.phase("forward")
        clock.now += 10
        told.update(300)
        told.note("first")
        clock.now += 60
        told.reach(800)
        told.note("second")


def test_lines_have_the_numbers(clock, capsys):
    work(clock)
    err = capsys.readouterr().err
    lines = [line[20:] for line in err.splitlines()]
    assert lines == [
        "extract: 300 of 1,000 img (30%), 7.5 img/s, ETA 0:01:33, bottleneck: decode (75%); first",
        "extract: 800 of 1,000 img (80%), 8 img/s, ETA 0:00:25, bottleneck: forward (100%); second",
        "extract: 800 of 1,000 img (80%) in 0:01:40, 8 img/s, bottleneck: forward (70%)",
    ]
    assert "\r" not in err and all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in err.splitlines())


def test_json_has_the_same_numbers(clock, capsys, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, "json")
    work(clock)
    first, _, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", first.pop("time"))
    assert first == {
        "what": "extract", "done": 300, "total": 1000, "unit": "img", "rate": 7.5, "elapsed_s": 40.0, "eta_s": 93.3,
        "bottleneck": "decode", "share": 0.75, "ended": False, "note": "first",
    }  # fmt: skip
    assert (last["done"], last["rate"], last["bottleneck"], last["share"], last["ended"]) == (
        800,
        8,
        "forward",
        0.7,
        True,
    )


def test_what_was_done_before_does_not_raise_the_rate(clock, capsys):
    with Progress("finetune", 1000, unit="img", done=100) as told:
        told.skip(400)
        clock.now += 10
        told.update(50)
        told.note("then")
        clock.now += 10
    then, last = capsys.readouterr().err.splitlines()
    assert "550 of 1,000 img (55%), 5 img/s, ETA 0:01:30; then" in then
    assert "550 of 1,000 img (55%) in 0:00:20, 2.5 img/s" in last


def test_a_line_comes_though_nothing_moves(capsys, monkeypatch):
    """A thread prints it: a step that takes an hour, or hangs, shows in the log, with what it waits for."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with Progress("extract", 20, unit="img") as told:
        told.phase("decode")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all("0 of 20 img (0%), 0 img/s, ETA unknown, bottleneck: decode (100%)" in line for line in lines[:-1])


def test_short_work_and_other_processes_leave_no_line(capsys, clock, monkeypatch):
    with Progress("score", 3, unit="score") as told:
        told.update(3)
    with pytest.raises(KeyError), Progress("score", 3, unit="score"):
        clock.now += 100
        raise KeyError
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    work(clock)
    assert capsys.readouterr().err == ""


def test_quiet_keeps_warnings(capsys, clock, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, "quiet")
    work(clock)
    say("notice: nobody needs this")
    say("warning: a probe diverged")
    assert capsys.readouterr().err == "warning: a probe diverged\n"


SLOW = {
    "decode": (Images, "__getitem__", 0.04),
    "forward": (fill, "_features", 0.3),
    "write": (fill, "put_shard", 0.25),
}


@pytest.mark.parametrize("phase", SLOW)
def test_the_bottleneck_is_what_is_slow(scenes, checkpoint, tmp_path, command, monkeypatch, phase):
    monkeypatch.setattr("featcache.store.manifest.SHARD_BYTES", 40_000)
    monkeypatch.setattr("featcache.store.manifest.CHUNK_ROWS", 2)
    place, name, seconds = SLOW[phase]
    quick = getattr(place, name)

    def slow(*arguments):
        time.sleep(seconds)
        return quick(*arguments)

    monkeypatch.setattr(place, name, slow)
    code, _, err = command("--json", "extract", *options(scenes, checkpoint, tmp_path / "s.zarr", split="val"))
    lines = [json.loads(line) for line in err.splitlines()]
    (last,) = [line for line in lines if line.get("what") == "extract"]
    assert code == 0 and last["done"] == last["total"] == 20 and last["ended"]
    assert last["bottleneck"] == phase
    assert any(line.get("message", "").startswith("store: ") for line in lines), "notices are JSON too"
    assert mode() == "lines", "the choice ends with the command"


def test_a_log_of_extract_and_train_probes(scenes, checkpoint, store, tmp_path, command, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    words = options(scenes, checkpoint, tmp_path / "s.zarr", split="val", workers=1)
    code, _, err = command("extract", *words)
    lines = [line for line in err.splitlines() if " extract: " in line]
    assert code == 0 and "\r" not in err and len(lines) > 1 and all(map(LINE.fullmatch, lines)), err
    assert "20 of 20 img (100%) in " in lines[-1]
    code, _, err = command("extract", *words, "--quiet")
    assert code == 0 and all(line.startswith("warning: ") for line in err.splitlines()), (
        "it is finished, but no word of it"
    )
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "probes:\n  - {features: pooled, head: linear, loss: bce, optimizer: {type: sgd, lr: [0.1, 1]}, epochs: 3, batch_size: 8}\n"
    )
    words = ["train-probes", "--grid", grid, "--store", store]
    code, _, err = command(*words, "--run", tmp_path / "run", "--json")
    lines = [json.loads(line) for line in err.splitlines()]
    last = [line for line in lines if line.get("what") == "train"][-1]
    assert code == 0 and last["done"] == last["total"] == 2 * 3 * 5, err
    assert last["bottleneck"] in ("read", "train", "validate", "save")
    code, out, err = command(*words, "--run", tmp_path / "other", "--quiet")
    assert code == 0 and out and err == ""


def test_a_bar_on_a_terminal(scenes, checkpoint, tmp_path, command, monkeypatch):
    """A real terminal: the bar is drawn over itself, and shows the bottleneck."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    seen = bytearray()

    def read():
        try:
            while piece := os.read(ours, 4096):
                seen.extend(piece)
        except OSError:
            # Linux says so when nobody holds the other end any more.
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        code, _, _ = command("extract", *options(scenes, checkpoint, tmp_path / "s.zarr", split="val"))
    reader.join()
    os.close(ours)
    text = seen.decode()
    assert code == 0 and "\rextract: 100%" in text and "20/20" in text and "bottleneck: " in text
    assert " of 20 img" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quiet", "verify", "no.zarr"], "Error: "),
        (["verify", "no.zarr", "--json"], "Error: "),
        (["--json", "verify", "no.zarr", "--quiet"], "Error: --json and --quiet exclude each other"),
    ],
)
def test_errors_are_told_in_any_mode(tmp_path, monkeypatch, command, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*words)
    assert code == 2 and err.splitlines()[-1].startswith(message)


def test_an_unknown_mode_is_an_error_before_anything_is_done(scenes, checkpoint, tmp_path, command, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, "loud")
    code, _, err = command("extract", *options(scenes, checkpoint, tmp_path / "s.zarr"))
    assert (code, err) == (
        2, "Error: the environment's FEATCACHE_PROGRESS is 'loud', and must be one of bar, lines, json, quiet\n",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
