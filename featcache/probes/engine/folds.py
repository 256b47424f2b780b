"""Scores on folds: each probe of a recipe is scored on the images that its fold held out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from featcache.probes.engine.scoring import predicting, tally_blocks, with_interval
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import find_probes
from featcache.probes.spec import ProbeSpec

# {metric: (value, low, high)}.
Values = dict[str, tuple[float, float, float]]


def score_folds(
    folder: str | Path,
    specs: Sequence[ProbeSpec],
    sets: TrainingSets,
    device: torch.device,
    metrics: Sequence[str],
    memory: float | None = None,
) -> dict[str, Values]:
    """Score recipes by their folds: {id of the probe that holds no fold out: Values}.

    specs: of the probes that hold folds out. A value is the mean over the folds of the score on the images that the fold
    held out. Given the probes, the folds' scores are independent, since they are of different images: the variance of
    the mean is the sum of their jackknife variances over the square of their number. A recipe of which a fold is
    missing has no scores. memory: as for load_predictors.
    """
    # {id: {(fold, of how many): {metric: (score, standard deviation, count)}}}
    parts: dict[str, dict[tuple[int, int], dict[str, tuple[float, ...]]]] = {}
    places = find_probes(folder)
    for sample in dict.fromkeys(spec.sample for spec in specs):
        images, labels = sets[sample], sets.held_out_labels(sample)
        members = [spec for spec in specs if spec.sample == sample and spec.id in places]
        for part, predictors in predicting(
            folder, members, sets.store, sets.splits, labels, device, metrics, places, memory
        ):
            tallies = tally_blocks(
                predictors, part, sets.store, images.splits, labels, device, metrics, images.held_out
            )
            for block, tally in zip(part, tallies, strict=True):
                estimates = tally.estimates()
                for p, spec in enumerate(block):
                    number, count = map(int, str(spec.fold).split("/"))
                    row = {m: tuple(column[p].item() for column in columns) for m, columns in estimates.items()}
                    parts.setdefault(replace(spec, fold=None).id, {})[number, count] = row
    # In the order of the folds, on which the last bit of a mean depends.
    ordered = {whole: [rows[key] for key in sorted(rows)] for whole, rows in parts.items()}
    return {whole: _mean(rows) for whole, rows in ordered.items() if len(rows) == next(iter(parts[whole]))[1]}


def _mean(folds: Sequence[dict[str, tuple[float, ...]]]) -> Values:
    """Return the mean scores of folds with intervals. folds: {metric: (score, standard deviation, count)} of each."""
    values: Values = {}
    for metric in folds[0]:
        scores, deviations, counts = _columns([fold[metric] for fold in folds])
        spread = deviations.square().sum().sqrt() / len(folds)
        (values[metric],) = with_interval(metric, scores.mean()[None], spread[None], counts.sum()[None])
    return values


def _columns(rows: Sequence[tuple[float, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    scores, deviations, counts = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return scores, deviations, counts
