"""`featcache compare`: is one probe better than another, or only on these images?"""

from dataclasses import dataclass

import click
import numpy as np
import torch

from featcache.arguments import NAME, NAMES, PATHS, listed, takes
from featcache.device import choose_device
from featcache.errors import BadInput
from featcache.probes.features import load_labels
from featcache.probes.probe_file import find_probes, load_specs
from featcache.probes.run import open_run, select, store_of
from featcache.probes.scores.jackknife import paired_test
from featcache.probes.scores.scoring import load_predictors, tally


@dataclass(frozen=True)
class Comparison:
    """Two probes on one metric: their scores, the difference first - second with its 95% interval, and its p value.

    See jackknife.paired_test for interval and p.
    """

    probes: tuple[str, str]
    split: str
    metric: str
    scores: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float


@takes(runs=PATHS, probes=NAMES, rule=NAME, stores=PATHS)
def compare(runs, probes=None, rule=None, stores=None, device=None):
    """Compare two probes on the images that their runs are judged on, by how each image counts in both.

    runs: folder of a finished run that holds both, or of two, which then must be scored on the same
    images. probes: two ids, in the order of the runs; else those that `rule` selects (see
    run.select): two of one run, or one of each. stores: of the runs, by default where they found them.
    Returns a Comparison for every metric. Raises BadInput.
    """
    opened = [open_run(run) for run in listed(runs)]
    stores = listed(stores) if stores else [None] * len(opened)
    if len(opened) > 2 or len(stores) != len(opened):
        raise BadInput("compare takes one or two runs, and as many stores if any")
    chosen = _two_probes(opened, probes, rule)
    device = choose_device(device)
    sources = [store_of(run, path) for run, path in zip(opened, stores, strict=True)]
    pairs = list(zip(opened, sources, strict=True)) * (3 - len(opened))
    (first, a), (second, b) = pairs[:2]
    split = first.judge
    if len(opened) == 2:
        _check_same_images(first, a, second, b)
    tallies = [_tally(run, store, probe, device) for (run, store), probe in zip(pairs[:2], chosen, strict=True)]
    if tallies[0].softmax != tallies[1].softmax:
        click.echo(
            "note: one probe gives a softmax, the other sigmoids; only ranking metrics compare them fairly", err=True
        )
    tables = [each.influences() for each in tallies]
    result = []
    for metric in first.metrics:
        pair = [(scores.item(), influences[0]) for scores, influences in (table[metric] for table in tables)]
        values = tuple(score for score, _ in pair)
        result.append(Comparison(tuple(chosen), split, metric, values, *paired_test(*pair)))
    return result


def _two_probes(runs, probes, rule):
    """Return the ids of the two probes, in the order of the runs."""
    if probes and rule:
        raise BadInput("name the probes with --probe or by a rule with --select, not both")
    if probes:
        chosen, way = list(probes), "--probe"
    elif rule:
        chosen, way = [probe for run in runs for probe in select(run, rule)], f"--select {rule!r}"
    else:
        raise BadInput("name two probes with --probe, or a rule with --select that chooses two")
    if len(chosen) != 2 or (len(runs) == 1 and chosen[0] == chosen[1]):
        found = f" ({', '.join(chosen[:5])}{', ...' if len(chosen) > 5 else ''})" if chosen else ""
        raise BadInput(f"compare takes two probes; {way} names {len(set(chosen))}{found}")
    for run, probe in zip(runs * (3 - len(runs)), chosen, strict=False):
        if probe in run.summary["diverged"]:
            raise BadInput(f"probe {probe} of run {run.path} diverged: it has no scores to compare")
    return chosen


def _check_same_images(first, a, second, b):
    """Raise BadInput unless two runs are judged on the same images with the same labels."""
    where = f"runs {first.path} and {second.path} cannot be compared"
    if first.judge != second.judge:
        raise BadInput(f"{where}: one is judged on {first.judge}, the other on {second.judge}")
    if (a.classes, a.task) != (b.classes, b.task):
        raise BadInput(f"{where}: their stores have other classes")
    parts = [[store[name] for name in run.summary["splits"][run.judge]] for run, store in ((first, a), (second, b))]
    # An id is unique within its split only. Copies of other bytes, such as smaller ones, are the same images too.
    named = [[(part.name, i) for part in each for i in part.ids] for each in parts]
    if named[0] != named[1] and not _same_bytes(*parts):
        raise BadInput(f"{where}: their {first.judge} splits hold other images, or in another order")
    labels = [load_labels(store, run.summary["splits"][run.judge]) for run, store in ((first, a), (second, b))]
    if not torch.equal(*labels):
        raise BadInput(f"{where}: the labels of their {first.judge} splits differ")


def _same_bytes(first, second):
    """Whether two unions of splits hold the same image files in the same order, as far as their stores know."""
    known = [[part.digests for part in each] for each in (first, second)]
    if any(digests is None for each in known for digests in each):
        return False
    return np.array_equal(*(np.concatenate(each) for each in known))


def _tally(run, store, probe, device):
    there, names = find_probes(run.path), run.summary["splits"][run.judge]
    (spec,) = load_specs(run.path, [probe], there)
    predictors = load_predictors(run.path, [[spec]], store, device, there)
    return tally(predictors, [[spec]], store, names, load_labels(store, names), device)[0]
