"""What trained probes say about the images of a store, gathered for their scores."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from featcache.probes.features import input_of, read_chunks
from featcache.probes.probe_file import Place, find_probes, load_probes
from featcache.probes.scores.tally import Tally
from featcache.probes.spec import ProbeSpec
from featcache.probes.stack import Predictor
from featcache.store.reader import Store

Blocks = Sequence[Sequence[ProbeSpec]]


def new_tally(specs: Sequence[ProbeSpec], labels: Tensor, classes: int, metrics: Iterable[str] | None = None) -> Tally:
    """Return an empty Tally for probes. labels, classes, metrics: as Tally takes them."""
    return Tally(labels, classes, [spec.loss.type == "ce" for spec in specs], metrics)


def load_predictors(
    folder: str | Path, group: Blocks, store: Store, device: torch.device, places: dict[str, Place] | None = None
) -> list[Predictor]:
    """Return the Predictor of each block of a run folder's probes. group: the blocks. places: of find_probes."""
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
) -> list[Tally]:
    """Tally what the probes of some blocks say about a union of splits: a Tally for each block.

    group: blocks that read one input. predictors: theirs. labels: of the images. The features
    are read once, whatever the number of blocks, and never held.
    """
    feature, pool = input_of(group[0][0])
    tallies = [new_tally(block, labels.to(device), len(store.classes)) for block in group]
    for part in read_chunks(store, splits, feature, pool, device):
        for predictor, tally in zip(predictors, tallies, strict=True):
            tally.add(predictor(part))
    return tallies
