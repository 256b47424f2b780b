"""The demo: its data, and the whole thread at a small size through the command line."""

import re
import subprocess
import sys

import pytest
from folders import tree_hash
from PIL import Image

from featcache.datasets import read_dataset
from featcache.demo.scenes import NAMES, make_scenes
from featcache.errors import BadInput
from featcache.probes.runs.probe_file import find_probes


def test_scenes_are_the_same_every_time_and_made_once(tmp_path):
    counts = {"train": 6, "val": 3, "test": 3}
    assert make_scenes(tmp_path / "a", counts) and make_scenes(tmp_path / "b", counts)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
    assert not make_scenes(tmp_path / "a", counts), "reused"
    with pytest.raises(BadInput, match="in the way"):
        make_scenes(tmp_path / "a", counts | {"train": 7})
    make_scenes(tmp_path / "c", counts, seed=1)
    assert tree_hash(tmp_path / "a") != tree_hash(tmp_path / "c")


def test_scenes_hold_what_they_say(scenes):
    data = read_dataset("voc", scenes)
    assert data.classes == tuple(sorted(NAMES))
    records = [r for split in data.splits.values() for r in split]
    assert {len(r.boxes) for r in records} == {1, 2, 3}
    assert any(r.box_difficult.any() for r in records) and any((r.labels == -1).any() for r in records)
    for record in records:
        with Image.open(record.image) as image:
            assert image.size == (record.width, record.height) == (320, 240)
        x0, y0, x1, y1 = record.boxes.T
        assert (0 <= x0).all() and (x0 < x1).all() and (x1 <= 320).all() and (0 <= y0).all() and (y1 <= 240).all()


@pytest.mark.process
def test_the_demo_prints_commands_that_work(tmp_path):
    """A tenth of the demo, from another folder; then one printed command by hand."""
    featcache = [sys.executable, "-m", "featcache"]
    done = subprocess.run([*featcache, "demo", "--scale", "0.1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^\$ featcache (.*)$", done.stdout, re.MULTILINE)
    assert [c.split()[0] for c in commands] == [
        "demo",
        "extract",
        "extract",
        "train-probes",
        "train-probes",
        "attribute",
        "compare",
        "report",
    ]
    assert "difference [95%]" in done.stdout and re.search(r"^EPG %  gradcam ", done.stdout, re.MULTILINE)
    page = tmp_path / "featcache-demo/report.html"
    assert page.stat().st_size > 100_000 and str(page) in done.stdout
    again = subprocess.run([*featcache, *commands[3].split()], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished already" in again.stderr
    assert len(find_probes(tmp_path / "featcache-demo/run-imagenet")) >= 48
