"""Scores of a run's probes, and the files that make it a finished run."""

import csv
import io
import itertools
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import featcache
from featcache.errors import BadInput
from featcache.probes.features import input_of, input_shape, load_labels, read_chunks
from featcache.probes.probe_file import find_probes, load_probes
from featcache.probes.run import SCORE_COLUMNS, open_run
from featcache.probes.run_file import maker, write_summary
from featcache.probes.scores.jackknife import interval
from featcache.probes.scores.metrics import TASK_METRICS, chance, gain
from featcache.probes.scores.seeds import over_seeds
from featcache.probes.scores.tally import TALLIES, MultiLabelTally
from featcache.probes.stack import Predictor, blocks, room_of
from featcache.probes.tables import write_table

# The tables of a run, and the columns that come first in each.
TABLES = {
    "scores.csv": SCORE_COLUMNS,
    "seeds.csv": ("name", "split", "metric", "mean", "std", "n", "diverged", "seeds", "probes"),
    "history.csv": ("probe", "epoch", "loss"),
    "calibration.csv": ("probe", "split", "bin"),
    "scores_per_class.csv": ("probe", "split", "class", "ap", "positives"),
}
# Of logits and weights while the features pass by once.
HELD_BYTES = 1 << 30


@dataclass(frozen=True)
class Scored:
    """Scores of one probe on one role. values: {metric: (value, low, high)}. classes: average precisions [C]
    or None if single-label. bins: [BINS, 3], see Tally.calibration.
    """

    values: dict
    classes: torch.Tensor | None
    bins: torch.Tensor


def finish_run(folder, specs, store, splits, basis, device, started, intervals=None):
    """Score a run's probes, write the tables of scores, then run.json, which makes it a finished run.

    specs: of probes that lie in the folder. splits: {role: splits of the store}. basis: fields of
    run.json: the store's id and path, `select`, {metric, split}, the `key` that marks it finished, and `files`, the
    checksums of what lies there besides the tables. started: time.monotonic() of the beginning. intervals: roles
    whose scores get one, by default all. Returns the Run. Raises BadInput if some of it is not there in the end.
    """
    metrics = TASK_METRICS[store.task]
    labels = {role: load_labels(store, names) for role, names in splits.items()}
    scored = _score(folder, specs, store, splits, labels, device, splits if intervals is None else intervals)
    history, diverged, scores = [], [], []
    # Without their weights, which would not all fit into memory.
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
    # One table after another: those of thousands of probes are large.
    rows = {
        "scores.csv": lambda: scores,
        "seeds.csv": lambda: over_seeds(scores),
        "history.csv": lambda: history,
        "calibration.csv": lambda: _calibration(scored),
        "scores_per_class.csv": lambda: _per_class(scored, store.classes, labels),
    }
    files = dict(basis["files"])
    for name in tables_of(store.task):
        files |= write_table(folder, name, _to_csv(rows[name](), TABLES[name]))
    scored, scores = None, None
    identity = store.manifest.identity
    summary = basis | {
        "arch": identity["arch"],
        "weights_sha256": identity["weights_sha256"],
        "preprocessing": identity["preprocessing"],
        "dataset": identity["dataset"]["name"],
        "classes": list(store.classes),
        "probes": len(specs),
        "diverged": diverged,
        "rows": {role: len(rows) for role, rows in labels.items()},
        "chance": {r: {m: chance(m, rows, len(store.classes)) for m in metrics} for r, rows in labels.items()},
        "device": str(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_summary(folder, summary | {"files": files})
    return _looked_at_again(folder, {spec.id for spec in specs})


def _looked_at_again(folder, ids):
    """Open a run that was just finished. Raises BadInput if files of it were lost or changed meanwhile."""
    run = open_run(folder)
    gone = [name for name, entry in run.summary["files"].items() if not _has_size(folder / name, entry["bytes"])]
    if not gone and not find_probes(folder).keys() >= ids:
        gone = ["a file of probes"]
    if gone:
        raise BadInput(
            f"run {folder} lost {gone[0]} while it was made; run the same {maker(run.summary)} again, which makes it anew"
        )
    return run


def _has_size(path, size):
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def tables_of(task):
    """Names of a run's tables; that of the classes only multi-label data has."""
    return [name for name in TABLES if name != "scores_per_class.csv" or task == "multi-label"]


def work(specs, store, device):
    """Yield (blocks, feature, pool) for each set of input that the specs ask for."""
    inputs = {}
    for spec in specs:
        inputs.setdefault(input_of(spec), []).append(spec)
    for (feature, pool), members in inputs.items():
        dim, positions = input_shape(store, feature, pool)
        yield blocks(members, dim, positions, len(store.classes), room_of(device)), feature, pool


def load_predictors(folder, group, store, device, there=None):
    """The Predictor of each block of a run folder's probes. group: lists of specs. there: as load_probes takes it."""
    predictors, there = [], find_probes(folder) if there is None else there
    for block in group:
        weights = {probe.spec.id: probe.weights for probe in load_probes(folder, [s.id for s in block], there)}
        predictors.append(Predictor(block, [weights[s.id] for s in block], len(store.classes), device))
    return predictors


def tally(predictors, group, store, splits, labels, device):
    """Gather what the probes of some blocks say of a union of splits: a Tally for each block.

    group: lists of specs that read one input; predictors: of them. labels: of the images. The features
    are read once, whatever the number of blocks, and never held.
    """
    classes, labels = len(store.classes), labels.to(device)
    feature, pool = input_of(group[0][0])
    tallies = [TALLIES[store.task](labels, classes, [s.loss.type for s in block]) for block in group]
    for part in read_chunks(store, splits, feature, pool, device):
        for predictor, each in zip(predictors, tallies, strict=True):
            each.add(predictor(part))
    return tallies


def _score(folder, specs, store, splits, labels, device, intervals):
    """Return {(probe id, role): Scored}."""
    scored, there = {}, find_probes(folder)
    with tqdm(total=len(specs) * len(splits), unit="score", desc="score") as progress:
        kept = (4 * len(store.classes) if store.task == "multi-label" else 24) * max(map(len, labels.values()))
        for group, _, _ in work(specs, store, device):
            for some in _passes(there, group, kept):
                predictors = load_predictors(folder, some, store, device, there)
                for role, parts in splits.items():
                    tallies = tally(predictors, some, store, parts, labels[role], device)
                    for block, each in zip(some, tallies, strict=True):
                        for spec, result in zip(block, _scored(each, role in intervals), strict=True):
                            scored[spec.id, role] = result
                        progress.update(len(block))
    return {(s.id, role): scored[s.id, role] for s in specs for role in splits}


def _passes(there, group, kept):
    """Divide blocks into lists of blocks whose weights, and `kept` bytes a probe, fit into memory together."""
    result, room = [], 0
    for block in group:
        # What is not there is told when it is loaded.
        each = kept + (there[block[0].id].bytes if block[0].id in there else 0)
        fit = max(HELD_BYTES // each, 1)
        for part in (block[start : start + fit] for start in range(0, len(block), fit)):
            if not result or len(part) * each > room:
                result.append([])
                room = HELD_BYTES
            result[-1].append(part)
            room -= len(part) * each
    return result


def _scored(tally, with_intervals):
    """Yield the Scored of every probe of a tally. Without intervals low and high are NaN."""
    if with_intervals:
        values = {metric: _rows(metric, *found) for metric, found in tally.estimates().items()}
    else:
        values = {metric: [(v, math.nan, math.nan) for v in found.tolist()] for metric, found in tally.scores().items()}
    bins = tally.calibration()
    classes = tally.average_precisions() if isinstance(tally, MultiLabelTally) else [None] * len(bins)
    for p in range(len(bins)):
        yield Scored({metric: rows[p] for metric, rows in values.items()}, classes[p], bins[p])


def _rows(metric, scores, deviations, counts):
    """[(score, low, high)] of scores [P]. See Tally.estimates."""
    low, high = interval(metric, scores, deviations, counts)
    return list(zip(scores.tolist(), low.tolist(), high.tolist(), strict=True))


def _series(probe, metric):
    """What is known of every epoch of a probe: the training loss, and the validation score where it was asked for."""
    measured = any(math.isfinite(score) for score in probe.scores)
    scores = {f"val_{metric}": [gain(metric, score) for score in probe.scores]} if measured else {}
    return {"loss": probe.losses} | scores


def _history(probe_id, series):
    """Yield a row for every epoch. series: {column: a value an epoch}."""
    for epoch, values in enumerate(zip(*series.values(), strict=True), 1):
        yield {"probe": probe_id, "epoch": epoch} | dict(zip(series, values, strict=True))


def _per_class(scored, classes, labels):
    positives = {role: (rows == 1).sum(0).tolist() for role, rows in labels.items()}
    for (probe, role), result in scored.items():
        for name, value, count in zip(classes, result.classes.tolist(), positives[role], strict=True):
            yield {"probe": probe, "split": role, "class": name, "ap": value, "positives": count}


def _calibration(scored):
    for (probe, role), result in scored.items():
        for number, (pairs, confidence, outcome) in enumerate(result.bins.tolist(), 1):
            means = {"confidence": confidence / pairs, "outcome": outcome / pairs} if pairs else {}
            yield {"probe": probe, "split": role, "bin": number, "pairs": int(pairs)} | means


def _to_csv(rows, first):
    """CSV, as bytes, with the columns `first`, then all others in order of appearance. NaN is an empty field."""
    rows = list(rows)
    columns = list(dict.fromkeys([*first, *itertools.chain(*dict.fromkeys(map(tuple, rows)))]))
    # Not StringIO, which takes four bytes a letter.
    data = io.BytesIO()
    text = io.TextIOWrapper(data, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        # What is not equal to itself is NaN.
        writer.writerow([value if value == value else "" for value in map(row.get, columns)])
    return data.getvalue()
