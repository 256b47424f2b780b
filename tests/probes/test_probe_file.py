"""Files of trained probes: what goes in comes out, and the runs of before, one file a probe, go on."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
import yaml
from folders import unpack
from parts import Head, Loss, Optimizer, Schedule

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.probe_file import Origin, find_probes, load_probe, load_probes, save_probes
from featcache.probes.spec import ProbeSpec
from featcache.probes.trained import TrainedProbe

SPEC = ProbeSpec(
    "x", "l:pooled", Head("linear"), Loss("bce"), Optimizer("sgd", 0.1, 0.9), Schedule("step", (0.6, 3.0)), 4, 16, 0
)
ORIGIN = Origin("store", "run")


@pytest.fixture
def old(tmp_path):
    """A run as it was made when every probe had a file of its own, and its store."""
    unpack("run_v1", tmp_path / "old")
    return tmp_path / "old"


def trained(seed, **fields):
    generator = torch.Generator().manual_seed(seed)
    weights = {"fc0.weight": torch.randn(3, 5, generator=generator), "fc0.bias": torch.randn(3, generator=generator)}
    return TrainedProbe(replace(SPEC, seed=seed), weights, [0.5, 0.25], None, 2, [float("nan"), 0.75], **fields)


def assert_same(a, b):
    assert (a.spec, a.losses, a.diverged, a.epoch, a.stopped) == (b.spec, b.losses, b.diverged, b.epoch, b.stopped)
    assert repr(a.scores) == repr(b.scores) and a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        torch.testing.assert_close(b.weights[name], weight, rtol=0, atol=0, equal_nan=True)


def test_probes_of_a_block_lie_in_one_file(tmp_path):
    (tmp_path / "probes").mkdir()
    probes = [trained(0), trained(1, stopped="patience"), trained(2)]
    nan = {n: torch.full_like(w, torch.nan) for n, w in probes[0].weights.items()}
    probes[2] = replace(probes[2], weights=nan, losses=[0.5, float("inf")], diverged=7)
    save_probes(tmp_path, probes, ORIGIN)
    save_probes(tmp_path, [trained(3)], ORIGIN)
    assert len(list((tmp_path / "probes").iterdir())) == 2 and len(find_probes(tmp_path)) == 4
    probes[2].losses[1] = float("nan")  # As JSON has it.
    for probe in probes[:2]:
        assert_same(probe, load_probe(tmp_path, probe.spec.id))
    assert repr(load_probe(tmp_path, probes[2].spec.id).losses) == repr(probes[2].losses)
    some = list(load_probes(tmp_path, [probes[1].spec.id, trained(3).spec.id]))
    assert {p.spec.seed for p in some} == {1, 3}
    with pytest.raises(BadInput, match="has no probe 0123456789"):
        load_probe(tmp_path, "0123456789")


def test_a_file_opens_with_safetensors_alone(tmp_path):
    (tmp_path / "probes").mkdir()
    probes = [trained(n) for n in range(4)]
    save_probes(tmp_path, probes, ORIGIN)
    (path,) = (tmp_path / "probes").iterdir()
    with safetensors.safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("fc0.weight"), torch.stack([p.weights["fc0.weight"] for p in probes]))


def test_thousands_of_tiny_probes_take_little(tmp_path):
    (tmp_path / "probes").mkdir()
    probes = [trained(n) for n in range(3000)]
    save_probes(tmp_path, probes, ORIGIN)
    size = sum(path.stat().st_size for path in (tmp_path / "probes").iterdir())
    assert size < 3000 * 1000
    assert {p.spec.seed for p in load_probes(tmp_path, find_probes(tmp_path))} == set(range(3000))


def test_what_is_in_two_files_is_one_probe(tmp_path):
    """As after a kill between the saving of a block and the next states."""
    (tmp_path / "probes").mkdir()
    save_probes(tmp_path, [trained(0), trained(1)], ORIGIN)
    save_probes(tmp_path, [trained(1)], ORIGIN)
    assert len(find_probes(tmp_path)) == 2
    assert_same(trained(1), load_probe(tmp_path, trained(1).spec.id))


def test_a_run_of_before_is_finished_readable_and_compared(old, command, monkeypatch):
    monkeypatch.chdir(old)
    before = {path: path.read_bytes() for path in (old / "run/probes").iterdir()}
    grid = yaml.safe_load((old / "run/grid.yaml").read_text())
    code, _, err = command("train-probes", "--grid", "run/grid.yaml", "--run", "run")
    assert code == 0 and "is finished already" in err
    again = featcache.train_probes(grid, run="new")
    assert find_probes("run").keys() == find_probes("new").keys() and len(find_probes("run")) == 5
    for probe in load_probes("run", find_probes("run")):
        other = load_probe("new", probe.spec.id)
        assert probe.spec == other.spec and probe.losses == pytest.approx(other.losses, rel=1e-5)
        for name, weight in probe.weights.items():
            torch.testing.assert_close(weight, other.weights[name], rtol=1e-5, atol=1e-6)
    one, two = (r["probe"] for r in again.scores if (r["split"], r["metric"], r["seed"]) == ("val", "map", "1"))
    code, out, _ = command("compare", "--run", "run", "--probe", one, "--probe", two)
    assert code == 0 and "mAP" in out
    assert command("report", "--run", "run", "--out", "r.html")[0] == 0
    assert {path: path.read_bytes() for path in (old / "run/probes").iterdir()} == before


def test_a_run_of_before_goes_on(old, monkeypatch, capsys):
    monkeypatch.chdir(old)
    shutil.copytree("run", "other")
    grid = yaml.safe_load((old / "run/grid.yaml").read_text())
    lost = sorted(Path("run/probes").iterdir())[1]
    lost.unlink()
    featcache.train_probes(grid, run="run")
    assert "4 of 5 probes are trained already" in capsys.readouterr().err
    probe, other = load_probe("run", lost.stem), load_probe("other", lost.stem)
    for name, weight in other.weights.items():
        torch.testing.assert_close(probe.weights[name], weight, rtol=1e-5, atol=1e-6)
    assert len(list(Path("run/probes").iterdir())) == 5
