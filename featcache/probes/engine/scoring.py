"""Scores of the probes in a run folder, with intervals."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.engine.predict import Predictor
from featcache.probes.engine.waves import blocks_by_input
from featcache.probes.inputs.input import Input
from featcache.probes.runs.probe_file import Place, find_probes, load_probes
from featcache.probes.scores.jackknife import interval
from featcache.probes.scores.metrics import metric_kind
from featcache.probes.scores.tally import Tally
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store

Blocks = Sequence[Sequence[ProbeSpec]]


def new_tally(specs: Sequence[ProbeSpec], labels: Tensor, classes: int, metrics: Iterable[str] | None = None) -> Tally:
    """Return an empty Tally for probes. labels, classes, metrics: as Tally takes them."""
    return Tally(labels, classes, [spec.loss.link == "softmax" for spec in specs], metrics)


def load_predictors(
    folder: str | Path, group: Blocks, store: Store, device: torch.device, places: dict[str, Place] | None = None
) -> list[Predictor]:
    """Return the Predictor of each block of a run folder's probes. group: the blocks. places: from find_probes."""
    predictors, places = [], find_probes(folder) if places is None else places
    for block in group:
        weights = {probe.spec.id: probe.weights for probe in load_probes(folder, [s.id for s in block], places)}
        predictors.append(Predictor(block, [weights[s.id] for s in block], len(store.classes), device))
    return predictors


def tally_blocks(
    predictors: Sequence[Predictor],
    group: Blocks,
    store: Store,
    splits: Sequence[str],
    labels: Tensor,
    device: torch.device,
    metrics: Iterable[str],
) -> list[Tally]:
    """Gather the logits of blocks on a union of splits, in a Tally for each block.

    group: blocks that read one input. predictors: of the blocks. labels: of the images. metrics: names of those that
    the tallies compute. The features are read once, whatever the number of blocks, and not kept.
    """
    read = Input.of(group[0][0])
    tallies = [new_tally(block, labels.to(device), len(store.classes), metrics) for block in group]
    for part in read.chunks(store, splits, device):
        for predictor, tally in zip(predictors, tallies, strict=True):
            tally.add(predictor(part))
    return tallies


@dataclass(frozen=True)
class Scored:
    """Scores of one probe on one role.

    values: {metric: (value, low, high)}. by_class: {metric: scores of the classes [C]}. bins: [BINS, 3], see
    Tally.calibration.
    """

    values: dict[str, tuple[float, float, float]]
    by_class: dict[str, Tensor]
    bins: Tensor


def score_probes(
    folder: str | Path,
    specs: Sequence[ProbeSpec],
    store: Store,
    splits: Mapping[str, Sequence[str]],
    labels: Mapping[str, Tensor],
    device: torch.device,
    intervals: Container[str],
    metrics: Sequence[str],
) -> dict[tuple[str, str], Scored]:
    """Score a run folder's probes: {(probe id, role): Scored}, in the order of specs and splits.

    splits, labels: {role: splits of the store} and {role: labels of their images}. intervals: roles whose scores get
    an interval. metrics: names of those to compute.
    """
    scored, places = {}, find_probes(folder)
    with tqdm(total=len(specs) * len(splits), unit="score", desc="score") as progress:
        largest = max(labels.values(), key=len)
        kept = new_tally(specs[:1], largest[:1], len(store.classes), metrics).bytes_per_image * len(largest)
        for _, group in blocks_by_input(specs, store, device):
            for part in _passes(places, group, kept, MemoryBudget.of(device).scores):
                predictors = load_predictors(folder, part, store, device, places)
                for role, names in splits.items():
                    tallies = tally_blocks(predictors, part, store, names, labels[role], device, metrics)
                    for block, tally in zip(part, tallies, strict=True):
                        for spec, result in zip(block, _scored(tally, role in intervals), strict=True):
                            scored[spec.id, role] = result
                        progress.update(len(block))
    return {(s.id, role): scored[s.id, role] for s in specs for role in splits}


def _passes(places: Mapping[str, Place], group: Blocks, kept: int, most: int) -> list[list[Sequence[ProbeSpec]]]:
    """Divide blocks into lists that fit into `most` bytes each: the weights, and `kept` bytes for every probe."""
    result: list[list[Sequence[ProbeSpec]]] = []
    room = 0
    for block in group:
        # A missing probe is reported when it is loaded.
        probe_bytes = kept + (places[block[0].id].bytes if block[0].id in places else 0)
        fit = max(most // probe_bytes, 1)
        for part in (block[start : start + fit] for start in range(0, len(block), fit)):
            if not result or len(part) * probe_bytes > room:
                result.append([])
                room = most
            result[-1].append(part)
            room -= len(part) * probe_bytes
    return result


def _scored(tally: Tally, with_intervals: bool) -> Iterator[Scored]:
    """Yield the Scored of every probe of a tally. Without intervals low and high are NaN."""
    if with_intervals:
        values = {metric: _with_interval(metric, *columns) for metric, columns in tally.estimates().items()}
    else:
        values = {
            metric: [(v, math.nan, math.nan) for v in scores.tolist()] for metric, scores in tally.scores().items()
        }
    bins, by_class = tally.calibration(), tally.by_class()
    for p in range(len(bins)):
        of_probe = {metric: rows[p] for metric, rows in values.items()}
        yield Scored(of_probe, {metric: scores[p] for metric, scores in by_class.items()}, bins[p])


def _with_interval(metric: str, scores: Tensor, deviations: Tensor, counts: Tensor) -> list[tuple[float, float, float]]:
    """Return [(score, low, high)] for scores [P]. deviations, counts: see Tally.estimates."""
    low, high = interval(scores, deviations, counts, metric_kind(metric).bounds)
    return list(zip(scores.tolist(), low.tolist(), high.tolist(), strict=True))
