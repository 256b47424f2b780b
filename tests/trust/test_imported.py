"""Damage to runs that import-probes made: as in test_damage.py, with an import as the command that mends."""

import pytest
import torch
import trust
from harm import cases_of, expected_of, harm_run, run_uses
from torch import nn

import featcache
from featcache.backbones.load import load_network
from featcache.probes.runs.probe_file import find_probes

SLICE, MOST = 12, 200


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(run of two imported probes with maps, actions on it, what they give, the same command again)."""
    folder = tmp_path_factory.mktemp("imported")
    store, run = folder / "s.zarr", folder / "run"
    trust.quietly(lambda: trust.write_store(trust.write_images(folder), store))
    backbone = load_network("random", "trust:network")[1].state_dict()
    files = [folder / f"{name}.pth" for name in "ab"]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        head = nn.Conv2d(6, len(trust.CLASSES), 1).state_dict()
        state = {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.fc.{k}": v for k, v in head.items()}
        torch.save({"state_dict": state}, file)

    def again(run):
        featcache.import_probes(files, store=store, run=run, loss="bce")
        featcache.attribute(run)

    trust.quietly(lambda: again(run))
    actions = uses(store, list(find_probes(run)), again)
    return run, actions, expected_of(run, actions, folder), again


def uses(store, probes, again):
    """What users do with such a run, {name: action(run)}."""
    made = {
        "import": lambda run: (again(run), trust.run_files(run))[1],
        "compare": lambda run: featcache.compare(run, probes=probes),
    }
    return {name: use for name, use in run_uses(store).items() if name != "train"} | made


def check(imported, place, count, most, test):
    run, actions, expected, again = imported
    cases = cases_of(run, count, most)
    kind, before = (run, actions, expected), trust.run_files(run)
    failures = harm_run(kind, place, cases, before, again, trust.run_files)
    trust.judged(failures, cases, f"{__file__}::{test}")


@pytest.mark.process
def test_a_damaged_imported_run_is_never_used(imported, tmp_path):
    check(imported, tmp_path, 3, SLICE, "test_a_damaged_imported_run_is_never_used")


@pytest.mark.slow
def test_many_ways_to_damage_an_imported_run(imported, tmp_path):
    check(imported, tmp_path, 12, MOST, "test_many_ways_to_damage_an_imported_run")
