"""Which chosen probes of a run are trained again, on more images than they were chosen with."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from featcache.errors import BadInput
from featcache.probes.engine.scoring import score_probes
from featcache.probes.grids.selection import Refit
from featcache.probes.inputs.input import load_labels
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import load_probes
from featcache.probes.runs.run import field_column
from featcache.probes.sample import FOLDS
from featcache.probes.scores.metrics import gain, metric_kind, metrics_of
from featcache.probes.spec import ProbeSpec
from featcache.progress import say


def why_no_refit(
    refit: Refit, specs: Sequence[ProbeSpec], splits: Mapping[str, Sequence[str]], chosen_on: str | None
) -> Iterator[str]:
    """Yield what keeps probes from being trained again, each as a line for the user."""
    if chosen_on == FOLDS:
        yield "by folds, what is chosen is trained on all of train anyway; leave refit out, or choose on val"
    elif chosen_on is None:
        yield "nothing is chosen"
    elif "val" not in splits:
        yield "there is no split in the role val to train on too"
    elif set(splits["val"]) & set(splits.get("test", ())):
        yield "val is the split that probes are scored on"
    if partial := next((spec for spec in specs if spec.sample.partial), None):
        yield (
            f"all of val would join the few images of {partial.sample.name}; leave refit out, or choose by "
            "select: {folds: 5}, which trains on all images of the part"
        )
    fields = list(dict.fromkeys(field for spec in specs for field in spec.flat()))
    for name in refit.per:
        try:
            field_column(name, fields, "per")
        except BadInput as error:
            yield error.message


def as_refits(specs: Iterable[ProbeSpec], refit: Refit) -> list[ProbeSpec]:
    """Return the specs as they are trained again, to their last epoch."""
    return [replace(spec, refit="+".join(refit.on)) for spec in specs]


def chosen_refits(
    folder: Path,
    specs: Sequence[ProbeSpec],
    sets: TrainingSets,
    selection: tuple[str, str],
    refit: Refit,
    device: torch.device,
    memory: float | None = None,
) -> list[ProbeSpec]:
    """Choose the recipes of a run that are trained again, and return their specs.

    A recipe is a probe apart from its seed. For each combination of the fields `refit.per`, it is the one whose seeds
    have the best mean score by the selection, (metric, role); a recipe of which a seed diverged is not chosen. Each of
    its seeds is trained again, up to the epoch that was kept of it. specs: of the probes in the folder to choose from.
    memory: as for engine.scoring.load_predictors.
    """
    (metric, role), store = selection, sets.store
    labels, metrics = {role: load_labels(store, sets.splits[role])}, metrics_of(store.task, metric)
    scored = score_probes(folder, specs, store, sets.splits, labels, device, (), metrics, memory)
    fields = list(dict.fromkeys(field for spec in specs for field in spec.flat()))
    columns = [field_column(name, fields, "refit.per") for name in refit.per]
    groups: dict[tuple[object, ...], dict[ProbeSpec, list[ProbeSpec]]] = {}
    for spec in specs:
        row = spec.flat()
        recipes = groups.setdefault(tuple(row.get(column) for column in columns), {})
        recipes.setdefault(spec.configuration, []).append(spec)
    epochs = {probe.spec.id: probe.epoch for probe in load_probes(folder, [spec.id for spec in specs])}
    result: list[ProbeSpec] = []
    for recipes in groups.values():
        means = {r: fmean(scored[s.id, role].values[metric][0] for s in seeds) for r, seeds in recipes.items()}
        finite = [recipe for recipe, mean in means.items() if mean == mean]
        if not finite:
            say(f"refit: all probes like {next(iter(recipes.values()))[0].id} diverged; none is chosen")
            continue
        best = max(finite, key=lambda recipe: gain(metric, means[recipe]))
        for spec in recipes[best]:
            epoch = epochs[spec.id]
            (again,) = as_refits([spec], refit)
            result.append(again if epoch in (None, spec.epochs) else replace(again, stop=epoch))
            _say(result[-1], metric, role)
    return result


def _say(spec: ProbeSpec, metric: str, role: str) -> None:
    until = f", to epoch {spec.stop} of {spec.epochs}" if spec.stop else ""
    say(
        f"refit: {spec.refit_of} ({spec.optimizer.summary_of_rate}), chosen by {role} {metric_kind(metric).title}, again "
        f"on {spec.refit} as {spec.id}{until}"
    )
