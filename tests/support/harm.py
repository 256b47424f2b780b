"""Harm to the files of runs and stores, and what comes of it: what damage and mending have in common for every harness."""

import itertools
import random
import re
import shutil
from functools import partial

import trust

import featcache


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
