"""A run that was made before heads, losses and optimisers became classes of their own: read, resumed, reported, verified.

tests/data/run_v2.zip was made at commit 9a87e09, in a folder of its own: a store of 20, 10 and 10 images, a run
`finished` with maps, and a run `killed`, by kill -9 when the blocks on the map had written their states after two of
three epochs. Both are of grid.yaml, which has every head, loss, optimiser and schedule of that commit.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import unpack

import featcache
from featcache.probes.runs.probe_file import find_probes, load_probe

# What a machine's own order of additions may change.
ROUNDING = 1e-5
KINDS = {
    "head.type": {"linear", "mlp", "bcos", "attentive"},
    "loss.type": {"bce", "ce", "focal", "asymmetric"},
    "optimizer.type": {"sgd", "adam", "adamw", "lars", "lbfgs"},
    "schedule.type": {"constant", "step", "cosine"},
}
TABLES = ("scores.csv", "seeds.csv", "history.csv", "calibration.csv", "scores_per_class.csv")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """The unpacked folder, which is the working directory too."""
    unpack("run_v2", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_equal(row, other):
    """The same columns and words, and the same numbers but for rounding."""
    # Kinds that are newer than the old run have columns of their own.
    assert row.keys() <= other.keys()
    for column, text in row.items():
        try:
            assert float(other[column]) == pytest.approx(float(text), abs=ROUNDING, nan_ok=True), column
        except ValueError:
            assert other[column] == text, column


def steps_of_solvers(run):
    """Return the ids of probes whose history has the steps of a solver, which may take others in every version."""
    return {row["probe"] for row in table(run / "scores.csv") if row["optimizer.type"] == "lbfgs"}


def assert_equal_runs(run, other):
    exact = steps_of_solvers(run)
    for name in TABLES:
        rows, others = (
            [row for row in table(path / name) if name != "history.csv" or row["probe"] not in exact]
            for path in (run, other)
        )
        assert len(rows) == len(others), name
        for row, its in zip(rows, others, strict=True):
            assert_equal(row, its)
    assert find_probes(run).keys() == find_probes(other).keys()
    for name in find_probes(run):
        probe, its = load_probe(run, name), load_probe(other, name)
        assert probe.spec == its.spec and probe.weights.keys() == its.weights.keys()
        losses = slice(-1, None) if name in exact else slice(None)
        assert probe.losses[losses] == pytest.approx(its.losses[losses], abs=ROUNDING)
        for key, weights in probe.weights.items():
            np.testing.assert_allclose(its.weights[key], weights, atol=ROUNDING, rtol=ROUNDING)


def test_it_holds_every_kind(before):
    run = featcache.open_run("finished")
    for column, types in KINDS.items():
        assert {row[column] for row in run.scores} == types
    assert {row["seed"] for row in run.scores} == {"0", "1"}
    assert len(list(Path("killed/partial").iterdir())) == 7 and not Path("killed/scores.csv").exists()


def test_it_is_undamaged(before, command):
    assert command("verify", "store.zarr")[0] == 0
    assert command("verify", "finished")[0] == 0
    code, out, err = command("verify", "killed")
    assert code == 1 and out.startswith("run.json: the run is not finished") and "1 finding in killed" in err


def test_the_finished_one_is_finished(before, command):
    names = sorted(Path("finished").rglob("*"))
    contents = [path.read_bytes() for path in names if path.is_file()]
    code, out, err = command("train-probes", "--grid", "grid.yaml", "--run", "finished")
    assert code == 0 and "best 10 of 23 probes" in out and "train:" not in err
    assert sorted(Path("finished").rglob("*")) == names
    assert [path.read_bytes() for path in names if path.is_file()] == contents


def test_the_killed_one_goes_on_and_ends_as_the_finished_one(before, command):
    states = {path.name for path in Path("killed/partial").iterdir()}
    code, _, err = command("train-probes", "--grid", "grid.yaml", "--run", "killed")
    assert code == 0 and "16 of 23 probes are trained already" in err
    assert not Path("killed/partial").exists()
    assert states <= {path.name for path in Path("killed/probes").iterdir()}, "the states' blocks are what was trained"
    assert_equal_runs(Path("finished"), Path("killed"))
    assert command("verify", "killed")[0] == 0


def test_trained_anew_it_is_the_same(before):
    featcache.train_probes("grid.yaml", run="anew")
    assert_equal_runs(Path("finished"), Path("anew"))


def test_a_lost_file_is_trained_again(before, command):
    shutil.copytree("finished", "whole")
    for path in list(Path("finished/probes").iterdir())[::3]:
        path.unlink()
    assert command("train-probes", "--grid", "grid.yaml", "--run", "finished")[0] == 0
    assert_equal_runs(Path("whole"), Path("finished"))


def test_another_grid_adds_to_it(before):
    grid = yaml.safe_load(Path("grid.yaml").read_text())
    grid["probes"] = [grid["probes"][0] | {"name": "more", "seed": 7}]
    old = {row["probe"] for row in featcache.open_run("finished").scores}
    grown = featcache.train_probes(grid, run="finished")
    assert {row["probe"] for row in grown.scores} > old and len(find_probes(Path("finished"))) == len(old) + 4


def test_maps_and_report(before, command):
    rows = table("finished/attribution.csv")
    assert command("report", "--run", "finished", "--out", "before.html")[0] == 0
    assert "Localisation" in Path("before.html").read_text()
    featcache.attribute("finished", examples=1)
    again = table("finished/attribution.csv")
    assert len(again) == len(rows) > 0
    for row, other in zip(rows, again, strict=True):
        assert_equal(row, other)


def test_its_probes_are_chosen_and_compared(before, command):
    code, _, err = command("compare", "--run", "finished", "--select", "best map per head.type")
    assert code == 2 and "names 4 (7b230944e2, 04d71c1ff2, 818cdfeb09, ca30fd93bc)" in err
    one, two = (row["probe"] for row in featcache.open_run("finished").scores[:400:200])
    code, out, _ = command("compare", "--run", "finished", "--probe", one, "--probe", two)
    assert code == 0 and "mAP" in out
