"""Scores of a run's probes, and the files that make it a finished run."""

import csv
import io
import json
import time

import numpy as np
import torch
from tqdm import tqdm

import featcache
from featcache.atomic import write_whole
from featcache.probes.features import load_features, load_labels
from featcache.probes.metrics import TASK_METRICS, chance, score
from featcache.probes.probe_file import load_probe
from featcache.probes.run import FILE, open_run
from featcache.probes.stack import blocks, predict

SCORE_COLUMNS = ("probe", "name", "split", "metric", "value", "low", "high", "epoch")


def finish_run(folder, specs, store, splits, basis, select, device, started):
    """Score a run's probes, write scores.csv and history.csv, then run.json, which makes it a finished run.

    specs: of probes that lie in the folder. splits: {role: splits of the store}. basis: fields of
    run.json: the store's id and path, the `key` that marks it finished. select: {metric, split} for run.json. started:
    time.monotonic() of the beginning. Returns the Run.
    """
    metrics = TASK_METRICS[store.task]
    scores = _score(folder, specs, store, splits, metrics, device)
    write_whole(folder / "scores.csv", _to_csv(scores, SCORE_COLUMNS))
    write_whole(folder / "history.csv", _to_csv(_history(folder, specs), ("probe", "epoch", "loss")))
    labels = {role: load_labels(store, names) for role, names in splits.items()}
    identity = store.manifest.identity
    summary = basis | {
        "arch": identity["arch"],
        "weights_sha256": identity["weights_sha256"],
        "preprocessing": identity["preprocessing"],
        "dataset": identity["dataset"]["name"],
        "select": select,
        "classes": list(store.classes),
        "probes": len(specs),
        "diverged": [s.id for s in specs if load_probe(folder, s.id).diverged is not None],
        "rows": {role: len(rows) for role, rows in labels.items()},
        "chance": {r: {m: chance(m, rows, len(store.classes)) for m in metrics} for r, rows in labels.items()},
        "device": str(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_whole(folder / FILE, json.dumps(summary, indent=1) + "\n")
    return open_run(folder)


def work(specs, store):
    """Yield (blocks, feature, pool) for each set of input that the specs ask for."""
    inputs = {}
    for spec in specs:
        inputs.setdefault((spec.features, spec.head.pools_first), []).append(spec)
    for (feature, pool), members in inputs.items():
        shape = next(iter(store.manifest.features[f]["shape"] for f in store.manifest.features if f == feature))
        positions = 1 if pool or len(shape) == 1 else int(np.prod(shape[1:]))
        yield blocks(members, shape[0], positions, len(store.classes)), feature, pool


def _score(folder, specs, store, splits, metrics, device):
    rows = {}
    names = {s.id: s.name for s in specs}
    with tqdm(total=len(specs) * len(splits), unit="score", desc="score") as progress:
        for role, parts in splits.items():
            labels = load_labels(store, parts)
            for group, feature, pool in work(specs, store):
                features = load_features(store, parts, feature, pool, device)
                for block in group:
                    weights = [load_probe(folder, s.id).weights for s in block]
                    logits = predict(block, weights, features, len(store.classes))
                    for metric in metrics:
                        for spec, (value, low, high) in zip(block, score(metric, logits, labels), strict=True):
                            head = (spec.id, names[spec.id], role, metric, value, low, high, spec.epochs)
                            rows[spec.id, role, metric] = dict(zip(SCORE_COLUMNS, head, strict=True)) | spec.flat()
                    progress.update(len(block))
    return [rows[s.id, role, metric] for s in specs for role in splits for metric in metrics]


def _history(folder, specs):
    for spec in specs:
        for epoch, loss in enumerate(load_probe(folder, spec.id).losses, 1):
            yield {"probe": spec.id, "epoch": epoch, "loss": loss}


def _to_csv(rows, first):
    """CSV text with the columns `first`, then all others in order of appearance. NaN is an empty field."""
    rows = list(rows)
    columns = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and v != v else v for k, v in row.items()})
    return text.getvalue()
