"""`featcache compare`: test whether one probe is better than another, beyond the images that both were scored on."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch

from featcache.arguments import NAME, NAMES, PATHS, listed, takes
from featcache.device import choose_device
from featcache.errors import BadInput
from featcache.probes.engine.scoring import load_predictors, new_tally, tally_blocks
from featcache.probes.inputs.input import load_labels
from featcache.probes.runs.probe_file import find_probes, load_specs
from featcache.probes.runs.run import Run, open_run, select, store_of
from featcache.probes.runs.tuned import ScoredImages, is_tuned, read_images, read_logits
from featcache.probes.scores.jackknife import paired_test
from featcache.probes.scores.metrics import task_of
from featcache.probes.scores.tally import Tally
from featcache.progress import say
from featcache.store.reader import Store

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class Comparison:
    """Two probes on one metric: their scores, the difference first - second with its 95% interval, and its p value.

    role: the one whose images they were scored on. See jackknife.paired_test for interval and p.
    """

    probes: tuple[str, str]
    role: str
    metric: str
    scores: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float


@takes(runs=PATHS, probes=NAMES, rule=NAME, stores=PATHS)
def compare(
    runs: Paths,
    probes: Sequence[str] | None = None,
    rule: str | None = None,
    stores: Paths | None = None,
    device: str | None = None,
) -> list[Comparison]:
    """Compare two probes on the images that their runs are scored on, with a test that is paired over images.

    runs: folder of a finished run that holds both probes, or the folders of two runs that are scored on the same
    images. probes: two ids, in the order of the runs; by default `rule` selects them (see run.select), two from one
    run, or one from each. stores: those of the runs, by default where the runs found them. Returns a Comparison for
    every metric. Raises BadInput.

        featcache.compare("runs/voc", rule="best map per loss")
    """
    opened = [open_run(run) for run in listed(runs)]
    paths = listed(stores) if stores else [None] * len(opened)
    if len(opened) > 2 or len(paths) != len(opened):
        raise BadInput("compare takes one or two runs, and as many stores if any")
    first_probe, second_probe = choose_probes(opened, probes, rule)
    chosen = first_probe, second_probe
    place = choose_device(device)
    # A fine-tuned run has no store: it keeps the logits of its probes.
    stored = [None if is_tuned(run.summary) else store_of(run, path) for run, path in zip(opened, paths, strict=True)]
    pairs = list(zip(opened, stored, strict=True)) * (3 - len(opened))
    (first, a), (second, b) = pairs[:2]
    if len(opened) == 2:
        _check_same_images(first, a, second, b)
    tallies = [
        _tally(run, store, probe, place, first.metrics) for (run, store), probe in zip(pairs[:2], chosen, strict=True)
    ]
    if tallies[0].softmax != tallies[1].softmax:
        say("note: one probe gives a softmax, the other sigmoids; only ranking metrics compare them fairly")
    tables = [tally.influences() for tally in tallies]
    result = []
    for metric in first.metrics:
        one, other = [(scores.item(), influences[0]) for scores, influences in (table[metric] for table in tables)]
        difference, low, high, p = paired_test(one, other)
        scores = one[0], other[0]
        result.append(Comparison(chosen, first.scored_on, metric, scores, difference, low, high, p))
    return result


def choose_probes(
    runs: Sequence[Run], probes: Sequence[str] | None, rule: str | None, one_is_enough: bool = False
) -> list[str]:
    """Return the ids of the two probes to compare, in the order of the runs. Raises BadInput for another number.

    one_is_enough: whether a single probe of a single run is taken too.
    """
    if probes and rule:
        raise BadInput("name the probes with --probe or by a rule with --select, not both")
    if probes:
        chosen, option = list(probes), "--probe"
    elif rule:
        chosen, option = [probe for run in runs for probe in select(run, rule)], f"--select {rule!r}"
    else:
        raise BadInput("name two probes with --probe, or a rule with --select that chooses two")
    if one_is_enough and len(runs) == 1 and len(set(chosen)) == 1:
        chosen = chosen[:1]
    elif len(chosen) != 2 or (len(runs) == 1 and chosen[0] == chosen[1]):
        names = f" ({', '.join(chosen[:5])}{', ...' if len(chosen) > 5 else ''})" if chosen else ""
        raise BadInput(f"compare takes two probes; {option} names {len(set(chosen))}{names}")
    for run, probe in zip([*runs] * (3 - len(runs)), chosen, strict=False):
        if probe in run.summary["diverged"]:
            raise BadInput(f"probe {probe} of run {run.path} diverged: it has no scores to compare")
    return chosen


def _check_same_images(first: Run, a: Store | None, second: Run, b: Store | None) -> None:
    """Raise BadInput unless two runs are scored on the same images with the same labels. a, b: their stores, if any."""
    where = f"runs {first.path} and {second.path} cannot be compared"
    if first.scored_on != second.scored_on:
        raise BadInput(f"{where}: one is judged on {first.scored_on}, the other on {second.scored_on}")
    if [first.summary["classes"], task_of(first.metrics)] != [second.summary["classes"], task_of(second.metrics)]:
        raise BadInput(f"{where}: their stores have other classes")
    one, other = _images(first, a), _images(second, b)
    # Ids are unique only within a split. Images that were resized or encoded anew differ in bytes but keep their ids.
    if one.names != other.names and not _same_bytes(one, other):
        raise BadInput(f"{where}: their {first.scored_on} splits hold other images, or in another order")
    if not torch.equal(one.labels, other.labels):
        raise BadInput(f"{where}: the labels of their {first.scored_on} splits differ")


def _images(run: Run, store: Store | None) -> ScoredImages:
    """Return the images that a run is scored on. Stores of earlier versions have no digests."""
    if store is None:
        return read_images(run.path, run.scored_on)
    names = run.summary["splits"][run.scored_on]
    parts = [store[name] for name in names]
    digests = [part.digests for part in parts if part.digests is not None]
    known = torch.from_numpy(np.concatenate(digests)) if len(digests) == len(parts) else None
    return ScoredImages([(part.name, i) for part in parts for i in part.ids], load_labels(store, names), known)


def _same_bytes(first: ScoredImages, second: ScoredImages) -> bool:
    """Return whether two lists of images hold the same files in the same order. Without digests nobody can tell."""
    return first.digests is not None and second.digests is not None and torch.equal(first.digests, second.digests)


def _tally(run: Run, store: Store | None, probe: str, device: torch.device, metrics: Sequence[str]) -> Tally:
    """Tally the logits of a probe on the images that its run is scored on, for these metrics."""
    places, names = find_probes(run.path), run.summary["splits"][run.scored_on]
    (spec,) = load_specs(run.path, [probe], places)
    if store is None:
        logits = read_logits(run.path, probe)[run.scored_on].to(device)
        tally = new_tally([spec], read_images(run.path, run.scored_on).labels.to(device), logits.shape[1], metrics)
        tally.add(logits.unsqueeze(0))
        return tally
    predictors = load_predictors(run.path, [[spec]], store, run.summary["splits"], device, places)
    return tally_blocks(predictors, [[spec]], store, names, load_labels(store, names), device, metrics)[0]
