"""`featcache train-probes`: a grid on a store, into a run folder."""

import csv
import hashlib
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
import yaml
from tqdm import tqdm

import featcache
from featcache.atomic import write_whole
from featcache.device import choose_device
from featcache.errors import BadInput
from featcache.probes.grid import parse_grid, read_grid
from featcache.probes.metrics import TASK_METRICS, chance, score
from featcache.probes.probe_file import load_probe, probe_path, save_probe
from featcache.probes.run import FILE, open_run, read_summary
from featcache.probes.stack import blocks, predict, train_block
from featcache.store.manifest import feature_of
from featcache.store.reader import open_store

SCORE_COLUMNS = ("probe", "name", "split", "metric", "value", "low", "high", "epoch")


def train_probes(grid, store=None, run=None, device=None, seed=0):
    """Train all probes of a grid on a store's features, score them, and write a run folder.

    grid: path of a YAML file, or its content as a dict. store: path; by default the grid's own.
    run: folder; by default runs/<grid>-<id>. device: torch device. seed: of the mini-batches' order.
    Returns the Run. Probes that the folder holds already are not trained again; a finished run of
    the same grid is returned at once. Raises BadInput.
    """
    device = choose_device(device)
    checked = parse_grid(grid) if isinstance(grid, dict) else read_grid(grid)
    source = store or checked.store
    if source is None:
        raise BadInput("no store: give --store, or write store: PATH into the grid")
    opened = open_store(source)
    splits = _roles(checked, opened)
    specs = _resolve(checked, opened)
    metrics = TASK_METRICS[opened.task]
    metric = checked.metric or metrics[0]
    if metric not in metrics:
        raise BadInput(f"select.metric: {metric!r} does not fit {opened.task} labels; use {' or '.join(metrics)}")
    resolved = checked.content | {
        "store": str(source),
        "splits": {role: list(names) for role, names in splits.items()},
        "select": {"metric": metric, "split": checked.split},
    }
    basis = {"store_id": opened.id, "seed": seed, "splits": resolved["splits"]}
    key = hashlib.sha256(json.dumps([basis, resolved["probes"]], sort_keys=True).encode()).hexdigest()
    stem = "grid" if isinstance(grid, dict) else Path(grid).stem
    folder = Path(run or Path("runs") / f"{stem}-{key[:8]}")
    if _finished(folder, basis, key):
        click.echo(f"run: {folder} is finished already", err=True)
        return open_run(folder)
    _begin(folder, basis, resolved)
    started = time.monotonic()
    _train_missing(folder, specs, opened, splits, device, seed)
    scores = _score(folder, specs, opened, splits, metrics, device)
    write_whole(folder / "scores.csv", _to_csv(scores, SCORE_COLUMNS))
    write_whole(folder / "history.csv", _to_csv(_history(folder, specs), ("probe", "epoch", "loss")))
    labels = {role: _labels(opened, names) for role, names in splits.items()}
    summary = basis | {
        "key": key,
        "store": str(source),
        "arch": opened.manifest.identity["arch"],
        "weights_sha256": opened.manifest.identity["weights_sha256"],
        "dataset": opened.manifest.identity["dataset"]["name"],
        "select": resolved["select"],
        "classes": list(opened.classes),
        "probes": len(specs),
        "diverged": [s.id for s in specs if load_probe(folder, s.id).diverged is not None],
        "rows": {role: len(rows) for role, rows in labels.items()},
        "chance": {r: {m: chance(m, rows, len(opened.classes)) for m in metrics} for r, rows in labels.items()},
        "device": str(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    write_whole(folder / FILE, json.dumps(summary, indent=1) + "\n")
    return open_run(folder)


def _roles(grid, store):
    """Return {role: splits}: the grid's, without a test split that it does not name and the store does not have."""
    roles = dict(grid.splits)
    if "test" not in grid.content.get("splits", {}) and "test" not in store.splits:
        # VOC2012's test labels, for one, were never published.
        del roles["test"]
    for role, names in roles.items():
        for name in names:
            if name not in store.splits:
                raise BadInput(
                    f"splits.{role}: store {store.path} has no split {name!r} (it has {', '.join(store.splits)})"
                )
    return roles


def _resolve(grid, store):
    """Return the specs with their features as the store names them; refuse what would be another model."""
    specs = []
    for spec in grid.specs:
        feature = store.manifest.feature(spec.features)
        if feature.kind == "tokens":
            layer = feature.layer
            raise BadInput(
                f"probe group {spec.name!r}: no head reads {feature} yet; take {layer}:cls, :patch_mean or :spatial"
            )
        if spec.head.type == "mlp" and feature.kind in ("pooled", "patch_mean") and spec.head.pool != "before":
            raise BadInput(
                f"probe group {spec.name!r}: an mlp head on {feature} is another model than on the map; take "
                f"{feature.layer}:spatial, or say pool: before if that is what you want"
            )
        specs.append(replace(spec, features=str(feature)))
    return specs


def _finished(folder, basis, key):
    """Whether `folder` is a finished run of this grid. Raises BadInput if it is a run on other data."""
    if not folder.exists():
        return False
    there = read_summary(folder)
    for field, value in basis.items():
        if there.get(field) != value:
            raise BadInput(
                f"run {folder} was made with {field} {there.get(field)!r}, not {value!r}; choose another --run"
            )
    return there.get("key") == key


def _begin(folder, basis, resolved):
    """Make the run folder; its run.json has no key, and so is unfinished, until all is written."""
    try:
        (folder / "probes").mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(basis, indent=1) + "\n")
        write_whole(folder / "grid.yaml", yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None


def _labels(store, splits):
    return torch.from_numpy(np.concatenate([store[name].labels for name in splits]))


def _features(store, splits, feature, pool, device):
    """Load a feature of a union of splits: [N, D], or [N, D, S] for a map, in the store's dtype.

    A grid is one long vector, channel by channel: D is its C * h * w. pool: average the map over
    positions now, in float32, exact for a plain linear head.
    """
    arrays = [store[name][feature] for name in splits]
    rows, bytes_ = sum(len(a) for a in arrays), sum(a.nbytes for a in arrays)
    pooled = pool and arrays[0].ndim == 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not pooled and bytes_ > free:
        raise BadInput(
            f"feature {feature} of {'+'.join(splits)} needs {bytes_ / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        )
    if pooled:
        result = np.empty((rows, arrays[0].shape[1]), dtype=np.float32)
        at = 0
        for array in arrays:
            for start in range(0, len(array), 256):
                part = array[start : start + 256].astype(np.float32).mean((2, 3))
                result[at : at + len(part)] = part
                at += len(part)
    else:
        result = arrays[0][:] if len(arrays) == 1 else np.concatenate([a[:] for a in arrays])
        if _is_grid(feature):
            result = result.reshape(len(result), -1)
        elif result.ndim == 4:
            result = result.reshape(*result.shape[:2], -1)
    return torch.from_numpy(result).to(device)


def _is_grid(feature):
    return feature_of(feature).kind == "grid"


def _pools_first(spec):
    return not _is_grid(spec.features) and (spec.head.type == "linear" or spec.head.pool == "before")


def _work(folder, specs, store):
    """Yield (blocks, feature, pool) for each set of input that the specs ask for."""
    inputs = {}
    for spec in specs:
        inputs.setdefault((spec.features, _pools_first(spec)), []).append(spec)
    for (feature, pool), members in inputs.items():
        shape = next(iter(store.manifest.features[f]["shape"] for f in store.manifest.features if f == feature))
        dim, positions = (int(np.prod(shape)), 1) if _is_grid(feature) else (shape[0], int(np.prod(shape[1:])))
        yield blocks(members, dim, 1 if pool else positions, len(store.classes)), feature, pool


def _train_missing(folder, specs, store, splits, device, seed):
    missing = [s for s in specs if not probe_path(folder, s.id).is_file()]
    if len(missing) < len(specs):
        click.echo(f"run: {len(specs) - len(missing)} of {len(specs)} probes are trained already", err=True)
    if not missing:
        return
    labels = _labels(store, splits["train"]).to(device)
    total = sum(s.epochs for s in missing)
    with tqdm(total=total, unit="probe-epoch", desc=f"train {len(missing)} probes") as progress:
        for group, feature, pool in _work(folder, missing, store):
            features = _features(store, splits["train"], feature, pool, device)
            for block in group:
                trained = train_block(
                    block, features, labels, len(store.classes), seed, lambda n=len(block): progress.update(n)
                )
                for probe in trained:
                    save_probe(folder, probe, store.id)
                    if probe.diverged is not None:
                        click.echo(
                            f"warning: probe {probe.spec.id} (lr {probe.spec.optimizer.lr:g}) diverged in epoch "
                            f"{probe.diverged + 1}; its scores are empty",
                            err=True,
                        )


def _score(folder, specs, store, splits, metrics, device):
    rows = {}
    names = {s.id: s.name for s in specs}
    with tqdm(total=len(specs) * len(splits), unit="score", desc="score") as progress:
        for role, parts in splits.items():
            labels = _labels(store, parts)
            for group, feature, pool in _work(folder, specs, store):
                features = _features(store, parts, feature, pool, device)
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
