"""Damage of every kind to every file of a store and of a run: what users then do gives what it gave before, or an error.

A silent difference is the failure that this looks for; a traceback is another.
"""

import shutil
from functools import partial

import pytest
import trust
from folders import tree_hash
from harm import cases_of, expected_of, harm_run, mended, run_uses

import featcache

# Cases of each kind of store or run, in the slice that always runs and in all.
SLICE, MOST = 12, 200
KINDS = {"zarr": ("s.zarr", None), "hdf5": ("s.hdf5", None), "zstd": ("s.zarr", "zstd")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trust.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", params=KINDS)
def whole(request, images, tmp_path_factory):
    """(kind, path of a store, path of a run on it, what every action on them gives)."""
    name, compression = KINDS[request.param]
    folder = tmp_path_factory.mktemp("whole")
    store, run = folder / name, folder / "run"
    trust.quietly(lambda: trust.write_store(images, store, compression=compression))
    trust.quietly(lambda: trust.train_and_explain(store, run))
    expected = {use: trust.outcome(action, store, folder / use) for use, action in uses(run).items()}
    assert {found.kind for found in expected.values()} == {"value"}, expected
    return request.param, store, run, expected


def uses(run):
    """What users do with a store, {name: action(store, free place)}. run: of probes that were trained on it before."""
    return {
        "read": lambda store, place: trust.reading(store),
        "batches": lambda store, place: trust.batches(store),
        "to_torch": lambda store, place: trust.tensors(store),
        "train": lambda store, place: trust.train(store, place),
        "convert": lambda store, place: trust.reading(
            featcache.convert(store, out=place.with_suffix(".hdf5" if store.suffix == ".zarr" else ".zarr"))
        ),
        "attribute": lambda store, place: trust.explain(trust.copied(run, place), store=store),
        "compare": lambda store, place: featcache.compare(run, rule="best map per loss", stores=[store]),
    }


def harm_store(whole, images, place, cases):
    """Return {case: what is wrong about it}."""
    kind, store, run, expected = whole
    before, failures = tree_hash(store), {}
    for number, (case, harm) in enumerate(cases.items()):
        copy = trust.copied(store, place / f"{number}/{store.name}")
        harm(copy)
        wrong = []
        for name, action in uses(run).items():
            got = trust.outcome(action, copy, place / f"{number}/{name}")
            if got.kind == "fault":
                wrong.append(f"{name}: {got.said}")
            elif got.kind == "value" and got.value != expected[name].value:
                wrong.append(f"{name}: SILENT DIFFERENCE")
        again = partial(trust.write_store, images, copy, compression=KINDS[kind][1])
        wrong += mended(copy, before, again, tree_hash)
        if wrong:
            failures[case] = "; ".join(wrong)
        shutil.rmtree(place / str(number))
    return failures


@pytest.mark.process
def test_a_damaged_store_is_never_used(whole, images, tmp_path):
    cases = cases_of(whole[1], 3, SLICE)
    trust.judged(harm_store(whole, images, tmp_path, cases), cases, f"{__file__}::test_a_damaged_store_is_never_used")


@pytest.mark.slow
def test_many_ways_to_damage_a_store(whole, images, tmp_path):
    cases = cases_of(whole[1], 6, MOST)
    trust.judged(harm_store(whole, images, tmp_path, cases), cases, f"{__file__}::test_many_ways_to_damage_a_store")


@pytest.mark.slow
def test_every_byte_of_the_small_files_of_a_store(whole, tmp_path):
    """A flipped bit in each byte of manifest and markers: the store does not open, and verify says so."""
    kind, store, _, _ = whole
    copy, failures = trust.copied(store, tmp_path / store.name), {}
    small = [n for n in trust.files_of(store) if n == "manifest.json" or n.startswith("commits/")]
    cases = trust.chosen(
        {f"{name} byte {at}": (name, at) for name in small for at in range((store / name).stat().st_size)}
    )
    for case, (name, at) in cases.items():
        data = (store / name).read_bytes()
        (copy / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        got = trust.outcome(trust.reading, copy), trust.outcome(featcache.verify, copy)
        if got[0].kind != "line" or not (got[1].kind == "line" or got[1].value):
            failures[case] = f"read: {got[0].kind} {got[0].said}; verify: {got[1].kind} {got[1].value or got[1].said}"
        (copy / name).write_bytes(data)
    trust.judged(failures, cases, f"{__file__}::test_every_byte_of_the_small_files_of_a_store")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """(store, run with maps, what every action on the run gives)."""
    folder = tmp_path_factory.mktemp("finished")
    store, run = folder / "s.zarr", folder / "run"
    trust.quietly(lambda: (trust.write_store(images, store), trust.train_and_explain(store, run)))
    return store, run, expected_of(run, run_uses(store), folder)


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory):
    """The same for a run that was stopped while states of its blocks lay on the disk."""
    store, whole, _ = finished
    run = tmp_path_factory.mktemp("unfinished") / "run"
    trust.quietly(lambda: trust.train_and_stop(store, run))
    assert list(run.glob("partial/*.safetensors"))
    return store, run, {"train": trust.Outcome("value", trust.trained_files(whole))}


def harm_finished(finished, place, cases):
    store, run, expected = finished
    again = partial(trust.train_and_explain, store)
    return harm_run((run, run_uses(store), expected), place, cases, trust.run_files(run), again, trust.run_files)


def harm_unfinished(unfinished, place, cases):
    store, run, expected = unfinished
    again = partial(trust.train, store)
    before = expected["train"].value
    return harm_run((run, run_uses(store), expected), place, cases, before, again, trust.trained_files)


@pytest.mark.process
def test_a_damaged_run_is_never_used(finished, tmp_path):
    cases = cases_of(finished[1], 3, SLICE)
    trust.judged(harm_finished(finished, tmp_path, cases), cases, f"{__file__}::test_a_damaged_run_is_never_used")


@pytest.mark.slow
def test_many_ways_to_damage_a_run(finished, tmp_path):
    cases = cases_of(finished[1], 12, MOST)
    trust.judged(harm_finished(finished, tmp_path, cases), cases, f"{__file__}::test_many_ways_to_damage_a_run")


@pytest.mark.process
def test_a_damaged_state_is_trained_again(unfinished, tmp_path):
    cases = cases_of(unfinished[1], 3, SLICE)
    trust.judged(
        harm_unfinished(unfinished, tmp_path, cases), cases, f"{__file__}::test_a_damaged_state_is_trained_again"
    )


@pytest.mark.slow
def test_many_ways_to_damage_a_state(unfinished, tmp_path):
    cases = cases_of(unfinished[1], 60, MOST)
    trust.judged(harm_unfinished(unfinished, tmp_path, cases), cases, f"{__file__}::test_many_ways_to_damage_a_state")
