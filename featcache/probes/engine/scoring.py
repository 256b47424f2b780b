"""Scores of the probes in a run folder, with intervals."""

import math
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featcache.probes.engine.blocks import Block
from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.engine.neighbours import NeighbourPredictor
from featcache.probes.engine.predict import Predictor
from featcache.probes.engine.waves import blocks_by_input
from featcache.probes.inputs.input import Input
from featcache.probes.runs.probe_file import Place, find_probes, load_probes
from featcache.probes.scores.jackknife import interval
from featcache.probes.scores.metrics import metric_kind
from featcache.probes.scores.tally import Tally
from featcache.probes.spec import ProbeSpec
from featcache.probes.trained import ROWS
from featcache.progress import Progress
from featcache.store.reader import Store

Blocks = Sequence[Sequence[ProbeSpec]]
Predictors = Sequence[Predictor | NeighbourPredictor]


def new_tally(specs: Sequence[ProbeSpec], labels: Tensor, classes: int, metrics: Iterable[str] | None = None) -> Tally:
    """Return an empty Tally for probes. labels, classes, metrics: as Tally takes them."""
    return Tally(labels, classes, [spec.loss.link == "softmax" for spec in specs], metrics)


def load_predictors(
    folder: str | Path,
    group: Blocks,
    store: Store,
    splits: Mapping[str, Sequence[str]],
    device: torch.device,
    places: dict[str, Place] | None = None,
    memory: float | None = None,
) -> Predictors:
    """Return a predictor of each block of a run folder's probes.

    group: the blocks. splits: {role: splits of the store}. places: from find_probes. memory: bytes for probes that read
    the training images whenever they predict, by default half of what is free.
    """
    predictors: list[Predictor | NeighbourPredictor] = []
    places = find_probes(folder) if places is None else places
    for block in group:
        weights = {probe.spec.id: probe.weights for probe in load_probes(folder, [s.id for s in block], places)}
        if block[0].head.trains:
            predictors.append(Predictor(block, [weights[s.id] for s in block], len(store.classes), device))
        else:
            roles = block[0].refit.split("+") if block[0].refit else ["train"]
            train = [name for role in roles for name in splits[role]]
            rows = [weights[spec.id].get(ROWS) for spec in block]
            predictors.append(NeighbourPredictor(block, rows, store, train, device, memory))
    return predictors


def tally_blocks(
    predictors: Predictors,
    group: Blocks,
    store: Store,
    splits: Sequence[str],
    labels: Tensor,
    device: torch.device,
    metrics: Iterable[str],
    rows: np.ndarray | None = None,
) -> list[Tally]:
    """Gather the logits of blocks on a union of splits, in a Tally for each block.

    group: blocks that read one input. predictors: of the blocks. labels: of the images. metrics: names of those that
    the tallies compute. rows: sorted rows of the union, by default all. The features are read once for all Predictors,
    and not kept.
    """
    if not group:
        return []
    read = Input.of(group[0][0])
    tallies = [new_tally(block, labels.to(device), len(store.classes), metrics) for block in group]
    readers = [(p, tally) for p, tally in zip(predictors, tallies, strict=True) if isinstance(p, Predictor)]
    for part in read.chunks(store, splits, device, rows) if readers else ():
        for predictor, tally in readers:
            tally.add(predictor(part))
    for other, tally in zip(predictors, tallies, strict=True):
        if isinstance(other, NeighbourPredictor):
            for logits in other(splits, rows):
                tally.add(logits)
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
    memory: float | None = None,
) -> dict[tuple[str, str], Scored]:
    """Score a run folder's probes: {(probe id, role): Scored}, in the order of specs and labels.

    splits: {role: splits of the store}. labels: {role: labels of its images} of the roles to score on. intervals: roles
    whose scores get an interval. metrics: names of those to compute. memory: as for load_predictors. A probe that is not
    scored on the images that it learns from lacks the role train.
    """
    scored, places = {}, find_probes(folder)
    with Progress("score", len(specs) * len(labels), unit="score") as progress:
        largest = max(labels.values(), key=len)
        for part, predictors in predicting(folder, specs, store, splits, largest, device, metrics, places, memory):
            for role in labels:
                of_role = [n for n, block in enumerate(part) if role != "train" or block[0].head.scored_on_training]
                blocks, own = [part[n] for n in of_role], [predictors[n] for n in of_role]
                tallies = tally_blocks(own, blocks, store, splits[role], labels[role], device, metrics)
                for block, tally in zip(blocks, tallies, strict=True):
                    for spec, result in zip(block, _scored(tally, role in intervals), strict=True):
                        scored[spec.id, role] = result
                progress.update(sum(map(len, part)))
    return {(s.id, role): scored[s.id, role] for s in specs for role in labels if (s.id, role) in scored}


def predicting(
    folder: str | Path,
    specs: Sequence[ProbeSpec],
    store: Store,
    splits: Mapping[str, Sequence[str]],
    labels: Tensor,
    device: torch.device,
    metrics: Sequence[str],
    places: dict[str, Place],
    memory: float | None,
) -> Iterator[tuple[Blocks, Predictors]]:
    """Yield (blocks that read one input, their predictors), as many at a time as the memory for scores holds.

    labels: of the most images that will be scored at once. places: from find_probes. The others are those of
    score_probes.
    """
    kept = new_tally(specs[:1], labels[:1], len(store.classes), metrics).bytes_per_image * len(labels) if specs else 0
    for _, group in blocks_by_input(specs, store, device):
        for part in _passes(places, _searching_together(group), kept, MemoryBudget.of(device).scores):
            yield part, load_predictors(folder, part, store, splits, device, places, memory)


def score_logits(
    spec: ProbeSpec, logits: Tensor, labels: Tensor, with_interval: bool, metrics: Iterable[str]
) -> Scored:
    """Score one probe by its logits float32 [N, C]. labels: of the images, on the device of the logits."""
    tally = new_tally([spec], labels, logits.shape[1], metrics)
    tally.add(logits.unsqueeze(0))
    return next(_scored(tally, with_interval))


def _searching_together(group: Sequence[Block]) -> Blocks:
    """Join the blocks that train nothing and compare images alike, since one search serves them all."""
    blocks: list[Sequence[ProbeSpec]] = []
    joined: dict[Hashable, list[ProbeSpec]] = {}
    for block in group:
        first = block[0]
        if first.head.trains:
            blocks.append(block)
            continue
        key = first.head.shared, first.refit
        if key not in joined:
            blocks.append(joined.setdefault(key, []))
        joined[key] += block
    return blocks


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
        values = {metric: with_interval(metric, *columns) for metric, columns in tally.estimates().items()}
    else:
        values = {
            metric: [(v, math.nan, math.nan) for v in scores.tolist()] for metric, scores in tally.scores().items()
        }
    bins, by_class = tally.calibration(), tally.by_class()
    for p in range(len(bins)):
        of_probe = {metric: rows[p] for metric, rows in values.items()}
        yield Scored(of_probe, {metric: scores[p] for metric, scores in by_class.items()}, bins[p])


def with_interval(metric: str, scores: Tensor, deviations: Tensor, counts: Tensor) -> list[tuple[float, float, float]]:
    """Return [(score, low, high)] for scores [P]. deviations, counts: see Tally.estimates."""
    low, high = interval(scores, deviations, counts, metric_kind(metric).bounds)
    return list(zip(scores.tolist(), low.tolist(), high.tolist(), strict=True))
