"""Finish a run: score the trained probes in its folder, and write the tables and run.json."""

import csv
import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import featcache
from featcache.errors import BadInput
from featcache.probes.engine.scoring import Scored, score_probes
from featcache.probes.inputs.input import load_labels
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import Run, open_run
from featcache.probes.runs.run_file import maker, write_summary
from featcache.probes.runs.seeds import over_seeds
from featcache.probes.runs.tables import COST_COLUMNS, COSTS, SCORE_COLUMNS, tables_of, write_table
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
) -> Run:
    """Score the probes of a run, write the tables, then run.json, which marks the run as finished.

    specs: of probes in the folder. splits: {role: splits of the store}. basis: fields of run.json, among them the
    store's id and path, `select`, the `key` that marks the run as finished, and `files`, the checksums of all files but
    the tables. started: time.monotonic() when the command began. intervals: roles whose scores get an interval, by
    default all. Returns the Run. Raises BadInput if part of the run was lost meanwhile.
    """
    metrics, classes = metrics_of(store.task, basis["select"]["metric"]), len(store.classes)
    labels = {role: load_labels(store, names) for role, names in splits.items()}
    roles = list(splits if intervals is None else intervals)
    scored = score_probes(folder, specs, store, splits, labels, device, roles, metrics)
    history: list[Row] = []
    diverged, scores = [], []
    # Weights are dropped: those of all probes may not fit into memory.
    trained = {probe.spec.id: replace(probe, weights={}) for probe in load_probes(folder, [s.id for s in specs])}
    for spec in specs:
        probe = trained[spec.id]
        history += _history(spec.id, _series(probe, basis["select"]["metric"]))
        diverged += [spec.id] if probe.diverged is not None else []
        fields = spec.flat()
        for role, metric in itertools.product(splits, metrics):
            value, low, high = scored[spec.id, role].values[metric]
            own = (spec.id, spec.name, role, metric, value, low, high, probe.epoch)
            scores.append(dict(zip(SCORE_COLUMNS, own, strict=True)) | fields)
    # Tables are made one after another because those of thousands of probes are large.
    rows: dict[str, Callable[[], Iterable[Row]]] = {
        "scores.csv": lambda: scores,
        "seeds.csv": lambda: over_seeds(scores),
        "history.csv": lambda: history,
        "calibration.csv": lambda: _calibration(scored),
        "scores_per_class.csv": lambda: _per_class(scored, store.classes, labels),
        COSTS: lambda: _costs(specs, trained, store.classes),
    }
    files = dict(basis["files"])
    tables = tables_of(metrics) | ({COSTS: COST_COLUMNS} if any(probe.choice for probe in trained.values()) else {})
    for name, columns in tables.items():
        files |= write_table(folder, name, _to_csv(rows[name](), columns))
    scored, scores = {}, []
    identity = store.manifest.identity
    summary = basis | {
        "arch": identity["arch"],
        "weights_sha256": identity["weights_sha256"],
        "preprocessing": identity["preprocessing"],
        "dataset": identity["dataset"]["name"],
        "classes": list(store.classes),
        "probes": len(specs),
        "diverged": diverged,
        "rows": {role: len(own) for role, own in labels.items()},
        "chance": {role: {m: _chance(m, own, classes) for m in metrics} for role, own in labels.items()},
        "device": str(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_summary(folder, summary | {"files": files})
    return _reopened(folder, {spec.id for spec in specs})


def _chance(metric: str, labels: Tensor, classes: int) -> float | None:
    return metric_kind(metric)(type=metric).chance(labels, classes)


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
    positives = {role: _positives(own, len(classes)).tolist() for role, own in labels.items()}
    for (probe, role), result in scored.items():
        columns = {str(metric_kind(m).class_column): values.tolist() for m, values in result.by_class.items()}
        for number, name in enumerate(classes):
            own = {column: values[number] for column, values in columns.items()}
            yield {"probe": probe, "split": role, "class": name} | own | {"positives": positives[role][number]}


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


def _positives(labels: Tensor, classes: int) -> Tensor:
    """Return how many images show each class, int64 [C]."""
    return (labels == 1).sum(0) if labels.ndim == 2 else labels.bincount(minlength=classes)


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
