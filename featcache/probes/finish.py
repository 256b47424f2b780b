"""Finish a run: score the trained probes in its folder, and write the tables and run.json."""

import csv
import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import featcache
from featcache.errors import BadInput
from featcache.probes.engine.folds import Values, score_folds
from featcache.probes.engine.scoring import Scored, score_probes
from featcache.probes.inputs.input import load_labels
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import Run, open_run
from featcache.probes.runs.run_file import maker, write_summary
from featcache.probes.runs.seeds import over_seeds
from featcache.probes.runs.tables import COST_COLUMNS, COSTS, SCORE_COLUMNS, tables_of, write_table
from featcache.probes.sample import FOLDS, positives
from featcache.probes.scores.metrics import gain, metric_kind, metrics_of
from featcache.probes.spec import ProbeSpec
from featcache.probes.trained import TrainedProbe
from featcache.store.reader import Store

Row = dict[str, Any]


def finish_run(
    folder: Path,
    specs: Sequence[ProbeSpec],
    store: Store,
    splits: Mapping[str, Sequence[str]],
    basis: dict[str, Any],
    device: torch.device,
    started: float,
    intervals: Iterable[str] | None = None,
    sets: TrainingSets | None = None,
    memory: float | None = None,
) -> Run:
    """Score the probes of a run, write the tables, then run.json, which marks the run as finished.

    specs: of probes in the folder; those that hold folds out only give the others their scores on folds. splits: {role:
    splits of the store}. basis: fields of run.json, among them the store's id and path, `select`, the `key` that marks
    the run as finished, and `files`, the checksums of all files but the tables. started: time.monotonic() when the
    command began. intervals: roles whose scores get an interval, by default all. sets: the images that probes trained
    on, where some hold folds out. memory: as for engine.scoring.load_predictors. Returns the Run. Raises BadInput if part
    of the run was lost meanwhile.
    """
    metrics = metrics_of(store.task, basis["select"]["metric"])
    labels = {role: load_labels(store, names) for role, names in splits.items()}
    roles = list(splits if intervals is None else intervals)
    scored: dict[tuple[str, str], Scored] = {}
    # What a probe learned from when it was trained again can no longer choose between probes.
    kept = [spec for spec in specs if not spec.fold]
    for refit, alike in itertools.groupby(kept, lambda spec: spec.refit):
        learned = set((refit or "").split("+")) - {"train"}
        known = {role: own for role, own in labels.items() if role not in learned}
        scored |= score_probes(folder, list(alike), store, splits, known, device, roles, metrics, memory)
    folds = FoldScores.of(folder, specs, sets, device, metrics, memory) if sets else None
    identity = store.manifest.identity
    facts = {name: identity[name] for name in ("arch", "weights_sha256", "preprocessing")}
    facts |= {"dataset": identity["dataset"]["name"]}
    return write_run(folder, kept, scored, labels, store.classes, store.task, basis | facts, device, started, folds)


@dataclass(frozen=True)
class FoldScores:
    """What probes that hold folds out give the others.

    probes: with a fold held out. values: {id of the probe that holds no fold out: Values}. chance: of each
    metric, as a mean over the folds of the first recipe.
    """

    probes: list[ProbeSpec]
    values: Mapping[str, Values]
    chance: dict[str, float | None]

    @classmethod
    def of(
        cls,
        folder: Path,
        specs: Sequence[ProbeSpec],
        sets: TrainingSets,
        device: torch.device,
        metrics: Sequence[str],
        memory: float | None,
    ) -> "FoldScores | None":
        """Score those of the specs that hold folds out on what they hold out; None if there are none."""
        folds = [spec for spec in specs if spec.fold]
        if not folds:
            return None
        values = score_folds(folder, folds, sets, device, metrics, memory)
        return cls(folds, values, _chance_of_folds(metrics, folds, sets, len(sets.store.classes)))


def write_run(
    folder: Path,
    specs: Sequence[ProbeSpec],
    scored: dict[tuple[str, str], Scored],
    labels: Mapping[str, Tensor],
    class_names: Sequence[str],
    task: str,
    basis: dict[str, Any],
    device: torch.device,
    started: float,
    folds: FoldScores | None = None,
) -> Run:
    """Write the tables of scored probes, then run.json; see finish_run.

    scored: {(probe id, role): Scored}, which is emptied to save memory. labels: {role: labels of its images}, for the
    roles that are scored. basis: also the fields of run.json about the backbone and the dataset.
    """
    metrics, classes = metrics_of(task, basis["select"]["metric"]), len(class_names)
    history: list[Row] = []
    diverged, scores = [], []
    # Weights are dropped: those of all probes may not fit into memory.
    trained = {probe.spec.id: replace(probe, weights={}) for probe in load_probes(folder, [s.id for s in specs])}
    for spec in specs:
        probe = trained[spec.id]
        history += _history(spec.id, _series(probe, basis["select"]["metric"]))
        diverged += [spec.id] if probe.diverged is not None else []
        fields = spec.flat()
        of_roles = {role: scored[spec.id, role].values if (spec.id, role) in scored else {} for role in labels}
        of_roles |= {FOLDS: folds.values.get(spec.id, {})} if folds else {}
        for role, metric in itertools.product(of_roles, metrics):
            value, low, high = of_roles[role].get(metric, (math.nan,) * 3)
            own = (spec.id, spec.name, role, metric, value, low, high, probe.epoch)
            scores.append(dict(zip(SCORE_COLUMNS, own, strict=True)) | fields)
    short = _short_of_optimum(folder, trained, folds)
    # Tables are made one after another because those of thousands of probes are large.
    rows: dict[str, Callable[[], Iterable[Row]]] = {
        "scores.csv": lambda: scores,
        "seeds.csv": lambda: over_seeds(scores),
        "history.csv": lambda: history,
        "calibration.csv": lambda: _calibration(scored),
        "scores_per_class.csv": lambda: _per_class(scored, class_names, labels),
        COSTS: lambda: _costs(specs, trained, class_names),
    }
    files = dict(basis["files"])
    tables = tables_of(metrics) | ({COSTS: COST_COLUMNS} if any(probe.choice for probe in trained.values()) else {})
    for name, columns in tables.items():
        files |= write_table(folder, name, _to_csv(rows[name](), columns))
    # They are not needed any more, and may be large.
    scored.clear()
    scores.clear()
    summary = basis | {
        "classes": list(class_names),
        "probes": len(specs),
        **({"fold_probes": len(folds.probes)} if folds else {}),
        "diverged": diverged,
        **({"short": short} if short else {}),
        "rows": {role: len(own) for role, own in labels.items()},
        "chance": {role: {m: _chance(m, own, classes) for m in metrics} for role, own in labels.items()}
        | ({FOLDS: folds.chance} if folds else {}),
        "device": str(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_summary(folder, summary | {"files": files})
    return _reopened(folder, {spec.id for spec in [*specs, *(folds.probes if folds else ())]})


def _short_of_optimum(folder: Path, trained: Mapping[str, TrainedProbe], folds: FoldScores | None) -> list[str]:
    """Return the ids of the probes that ended short of their optimum, or of which a fold did."""
    short = {probe.spec.id for probe in trained.values() if probe.stopped == "iterations"}
    of_folds = load_probes(folder, [spec.id for spec in folds.probes]) if folds else ()
    short |= {replace(probe.spec, fold=None).id for probe in of_folds if probe.stopped == "iterations"}
    return [name for name in trained if name in short]


def _chance(metric: str, labels: Tensor, classes: int) -> float | None:
    return metric_kind(metric)(type=metric).chance(labels, classes)


def _chance_of_folds(
    metrics: Sequence[str], folds: Sequence[ProbeSpec], sets: TrainingSets, classes: int
) -> dict[str, float | None]:
    """Return the chance of each metric, as a mean over the folds of the first recipe."""
    first = replace(folds[0].sample, fold=None)
    held_out = [
        sets.held_out_labels(s) for s in dict.fromkeys(f.sample for f in folds) if replace(s, fold=None) == first
    ]
    levels = {metric: [_chance(metric, labels, classes) for labels in held_out] for metric in metrics}
    return {m: None if None in own else fmean(level or 0.0 for level in own) for m, own in levels.items()}


def _reopened(folder: Path, ids: set[str]) -> Run:
    """Open a run that was just finished. Raises BadInput if any of its files were lost or changed meanwhile."""
    run = open_run(folder)
    gone = [name for name, entry in run.summary["files"].items() if not _has_size(folder / name, entry["bytes"])]
    if not gone and not find_probes(folder).keys() >= ids:
        gone = ["a file of probes"]
    if gone:
        raise BadInput(
            f"run {folder} lost {gone[0]} while it was made; run the same {maker(run.summary)} again, which makes it anew"
        )
    return run


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _series(probe: TrainedProbe, metric: str) -> dict[str, list[float]]:
    """Return {column: value of each epoch} of a probe: the training loss, and validation scores if it has any."""
    measured = any(math.isfinite(score) for score in probe.scores)
    scores = {f"val_{metric}": [gain(metric, score) for score in probe.scores]} if measured else {}
    return {"loss": probe.losses} | scores


def _history(probe_id: str, series: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Yield a row for every epoch. series: {column: value of each epoch}."""
    for epoch, values in enumerate(zip(*series.values(), strict=True), 1):
        yield {"probe": probe_id, "epoch": epoch} | dict(zip(series, values, strict=True))


def _per_class(
    scored: Mapping[tuple[str, str], Scored], classes: Sequence[str], labels: Mapping[str, Tensor]
) -> Iterator[Row]:
    """Yield the rows of scores_per_class.csv."""
    shown = {role: positives(own.cpu().numpy(), len(classes)).tolist() for role, own in labels.items()}
    for (probe, role), result in scored.items():
        columns = {str(metric_kind(m).class_column): values.tolist() for m, values in result.by_class.items()}
        for number, name in enumerate(classes):
            own = {column: values[number] for column, values in columns.items()}
            yield {"probe": probe, "split": role, "class": name} | own | {"positives": shown[role][number]}


def _costs(specs: Iterable[ProbeSpec], trained: Mapping[str, TrainedProbe], classes: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of costs.csv. `excess` is that of the machine that was kept."""
    for spec in specs:
        choice = trained[spec.id].choice
        for number, name in enumerate(classes if choice else ()):
            assert choice is not None
            for k, cost in enumerate(choice.costs):
                chosen = k == choice.chosen[number]
                values = spec.id, name, cost, choice.ap[number][k], choice.folds[number], int(chosen)
                kept = (choice.excess[number], choice.draw) if chosen else (None, None)
                yield dict(zip(COST_COLUMNS, values + kept, strict=True))


def _calibration(scored: Mapping[tuple[str, str], Scored]) -> Iterator[Row]:
    """Yield the rows of calibration.csv."""
    for (probe, role), result in scored.items():
        for number, (pairs, confidence, outcome) in enumerate(result.bins.tolist(), 1):
            means = {"confidence": confidence / pairs, "outcome": outcome / pairs} if pairs else {}
            yield {"probe": probe, "split": role, "bin": number, "pairs": int(pairs)} | means


def _to_csv(rows: Iterable[Row], first: Sequence[str]) -> bytes:
    """Return CSV with the columns `first`, then all others in order of appearance. NaN becomes an empty field."""
    rows = list(rows)
    columns = list(dict.fromkeys([*first, *itertools.chain(*dict.fromkeys(map(tuple, rows)))]))
    # A StringIO would take four bytes for each character.
    data = io.BytesIO()
    text = io.TextIOWrapper(data, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        # Only NaN is not equal to itself.
        writer.writerow([value if value == value else "" for value in map(row.get, columns)])
    return data.getvalue()
