"""Damage of every kind to every file of a store and of a run: what users then do gives what it gave before, or an error.

A silent difference is the failure that this looks for; a traceback is another.
"""

import random

import pytest
import trust
from conftest import tree_hash

import featcache

# Cases of each kind of store or run, in the slice that always runs.
SLICE = 24
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
    trust.quietly(lambda: (trust.train(store, run), featcache.attribute(run)))
    expected = {name: trust.outcome(lambda a=action: a(store, folder / name)) for name, action in uses(run).items()}
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


def cases_of(folder, count, most=None):
    """{name: Harm} of all files of a folder; with `most`, a sample in which every kind of harm and file has its chance."""
    cases = {str(h): h for file in trust.files_of(folder) for h in trust.harms(folder, file, count)}
    if most:
        cases = {name: cases[name] for name in random.Random(0).sample(sorted(cases), most)}
    return trust.chosen(cases)


def harm_store(whole, images, place, cases):
    """Return {case: what is wrong about it}."""
    kind, store, run, expected = whole
    before, failures = tree_hash(store), {}
    for number, (case, harm) in enumerate(cases.items()):
        copy = trust.copied(store, place / f"{number}/{store.name}")
        harm(copy)
        wrong = []
        for name, action in uses(run).items():
            got = trust.outcome(lambda a=action, n=name: a(copy, place / f"{number}/{n}"))
            if got.kind == "fault":
                wrong.append(f"{name}: {got.said}")
            elif got.kind == "value" and got.value != expected[name].value:
                wrong.append(f"{name}: SILENT DIFFERENCE")
        wrong += mended(copy, before, lambda: trust.write_store(images, copy, compression=KINDS[kind][1]), tree_hash)
        if wrong:
            failures[case] = "; ".join(wrong)
        trust.shutil.rmtree(place / str(number))
    return failures


def mended(folder, before, again, content):
    """What is wrong about verify, its repair, and the same command again, as a list of lines."""
    found = trust.outcome(lambda: featcache.verify(folder))
    if found.kind != "value":
        # A folder that cannot be told for a store any more is an error of verify as well.
        return [] if found.kind == "line" else [f"verify: {found.said}"]
    if not found.value:
        return ["verify: FINDS NOTHING"]
    repaired = trust.outcome(lambda: featcache.verify(folder, repair=True))
    if repaired.kind != "value":
        return [f"repair: {repaired.said}"]
    made = trust.outcome(again)
    if made.kind != "value":
        return [f"the same command after repair: {made.said}"]
    return [] if content(folder) == before else ["the same command after repair: OTHER BYTES"]


def test_a_damaged_store_is_never_used(whole, images, tmp_path):
    cases = cases_of(whole[1], 3, SLICE)
    trust.judged(harm_store(whole, images, tmp_path, cases), cases, f"{__file__}::test_a_damaged_store_is_never_used")


@pytest.mark.slow
def test_every_file_of_a_store_in_every_way(whole, images, tmp_path):
    cases = cases_of(whole[1], 6)
    trust.judged(harm_store(whole, images, tmp_path, cases), cases, f"{__file__}::test_every_file_of_a_store_in_every_way")
