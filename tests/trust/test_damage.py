"""Damage of every kind to every file of a store and of a run: what users then do gives what it gave before, or an error.

A silent difference is the failure that this looks for; a traceback is another.
"""

import itertools
import random
import re
import shutil
from functools import partial

import pytest
import trust
from folders import tree_hash

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


def cases_of(folder, count, most=None):
    """{name: Harm} of all files of a folder; with `most`, a sample that takes turns among the roles that files have."""
    harms = [h for file in trust.files_of(folder) for h in trust.harms(folder, file, count)]
    if most:
        chance, roles = random.Random(0), {}
        for harm in chance.sample(harms, len(harms)):
            roles.setdefault(re.sub(r"\d+|train|val|test", "", harm.file), []).append(harm)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*roles.values()))
        harms = list(itertools.islice(filter(None, turns), most))
    return trust.chosen({str(harm): harm for harm in harms})


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


def mended(folder, before, again, content):
    """What is wrong about verify, its repair, and the same command again, as a list of lines."""
    found = trust.outcome(featcache.verify, folder)
    if found.kind != "value":
        return [f"verify: {found.said}"]
    if not found.value:
        return ["verify: FINDS NOTHING"]
    repaired = trust.outcome(lambda: featcache.verify(folder, repair=True))
    if repaired.kind != "value":
        return [f"repair: {repaired.said}"]
    made = trust.outcome(again)
    if made.kind != "value":
        return [f"the same command after repair: {made.said}"]
    return [] if content(folder) == before else ["the same command after repair: OTHER BYTES"]


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


def expected_of(run, uses, folder):
    """What every action of {name: action(run)} gives."""
    expected = {}
    for name, action in uses.items():
        copy = trust.copied(run, folder / f"copy-{name}/run")
        expected[name] = trust.outcome(action, copy)
    assert {found.kind for found in expected.values()} == {"value"}, expected
    return expected


def run_uses(store):
    """What users do with a run, {name: action(run)}. Each gets a copy of its own."""
    return {
        "open": lambda run: trust.opened(run),
        "train": lambda run: (trust.train(store, run), trust.trained_files(run))[1],
        "attribute": lambda run: trust.explain(run),
        "compare": lambda run: featcache.compare(run, rule="best map per loss"),
        "export": lambda run: trust.exported(run),
        "report": lambda run: trust.page(run),
    }


def harm_run(kind, place, cases, before, again, content):
    """Return {case: what is wrong about it}. kind: (run, uses, what they give). before, again, content: see mended."""
    run, uses, expected = kind
    failures = {}
    for number, (case, harm) in enumerate(cases.items()):
        wrong = []
        for name in expected:
            copy = trust.copied(run, place / f"{number}/{name}/run")
            harm(copy)
            got, good = trust.outcome(uses[name], copy), expected[name].value
            if got.kind == "fault":
                wrong.append(f"{name}: {got.said}")
            elif got.kind == "value" and got.value != good and not trust.told(harm.file, name, got.said):
                wrong.append(f"{name}: SILENT DIFFERENCE{trust.differing(good, got.value)}")
        copy = trust.copied(run, place / f"{number}/mend/run")
        harm(copy)
        wrong += mended(copy, before, partial(again, copy), content)
        if wrong:
            failures[case] = "; ".join(wrong)
        shutil.rmtree(place / str(number))
    return failures


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
