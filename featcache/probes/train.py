"""`featcache train-probes`: a grid on a store, into a run folder."""

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import click
import yaml

from featcache.atomic import write_whole
from featcache.device import choose_device
from featcache.errors import BadInput, nearest, shown
from featcache.probes.features import input_shape
from featcache.probes.gemm import check_precision
from featcache.probes.grids.grid import load_grid
from featcache.probes.run import FILE, open_run, read_summary
from featcache.probes.scores.metrics import TASK_METRICS
from featcache.probes.scores.scoring import check_apart, files, finish_run
from featcache.probes.spec import logit_offset
from featcache.probes.sweep import plan_buffers, train_missing
from featcache.ranks import join_ranks
from featcache.store.folder import open_folder
from featcache.store.reader import open_store


def train_probes(grid, store=None, run=None, device=None, seed=0, parity=None, memory=None):
    """Train all probes of a grid on a store's features, score them, and write a run folder.

    grid: path of a YAML file, or its content as a dict. store: path; by default the grid's own.
    run: folder; by default runs/<grid>-<id>. device: torch device. seed: of the mini-batches' order.
    parity: name of one of the grid's profiles, such as how-to-probe. memory: bytes of features to hold,
    by default half of what is free; larger ones are streamed from the store.
    Returns the Run; under torchrun, whose processes share the blocks, None in all but the first. Probes that
    the folder holds already are not trained again; a finished run of the same grid is returned at once.
    Raises BadInput.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise BadInput(f"seed: expected a whole number from 0 to {2**32 - 1}, not {shown(seed)}")
    ranks = join_ranks()
    device = choose_device(device, ranks.local_rank)
    checked = load_grid(grid, parity)
    source = store or checked.store
    if source is None:
        raise BadInput("no store: give --store, or write store: PATH into the grid")
    opened = open_store(source)
    splits = store_splits(checked, opened)
    specs = store_specs(checked, opened, splits["train"])
    metric = check_fit(checked, specs, opened, splits, device)
    if checked.search and ranks.size > 1:
        raise BadInput("search: halving compares all probes: start it in one process, without torchrun")
    resolved = checked.content | {
        "store": str(source),
        "splits": {role: list(names) for role, names in splits.items()},
        "select": {"metric": metric, "split": checked.split},
    }
    # Both decide which weights are kept, so that a run is of one choice.
    chosen_by = {"select": resolved["select"], "search": checked.search and asdict(checked.search)}
    basis = {"store_id": opened.id, "seed": seed, "splits": resolved["splits"]} | chosen_by
    asked = [basis, resolved["probes"], *([checked.rules] if checked.rules else [])]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    basis["parity"] = checked.parity
    stem = "grid" if isinstance(grid, dict) else Path(grid).stem
    folder = Path(run or Path("runs") / f"{stem}-{key[:8]}")
    planned = plan_buffers(specs, opened, splits, memory, device)
    started = time.monotonic()
    with ranks.leading(open_folder(folder).locked(f"waiting: another process is training into {folder}")) as leads:
        if leads and _finished(folder, basis, key, files(folder, specs, opened.task)):
            ranks.share([])
            click.echo(f"run: {folder} is finished already", err=True)
            return open_run(folder)
        if leads:
            # How features were read decides the order of the rows, so a begun run stays with it.
            begun = read_summary(folder).get("buffers", {}) if (folder / FILE).exists() else {}
            basis["buffers"] = planned | {name: rows for name, rows in begun.items() if name in planned}
            _begin(folder, basis, resolved)
        judge = (metric, checked.split)
        train_missing(folder, specs, opened, splits, device, seed, judge, basis.get("buffers"), checked.search, ranks)
        if not leads:
            return None
        basis |= {"key": key, "store": str(source)}
        return finish_run(folder, specs, opened, splits, basis, device, started)


def check_fit(grid, specs, store, splits, device):
    """Return the metric to select by. Raises BadInput for what cannot be trained on a store and device."""
    metrics = TASK_METRICS[store.task]
    metric = grid.metric or metrics[0]
    if metric not in metrics:
        raise BadInput(f"select.metric: {metric!r} does not fit {store.task} labels; use {' or '.join(metrics)}")
    check_apart(store, splits)
    if grid.search and any(s.optimizer.type == "lbfgs" for s in specs):
        raise BadInput("search: halving compares probes after some epochs, and the optimizer lbfgs has none")
    for precision in {spec.precision for spec in specs}:
        check_precision(precision, device)
    return metric


def store_splits(grid, store):
    """Return {role: splits}: the grid's, without a test split that it does not name and the store does not have."""
    roles = dict(grid.splits)
    if "test" not in grid.content.get("splits", {}) and "test" not in store.splits:
        # VOC2012's test labels, for one, were never published.
        del roles["test"]
    for role, names in roles.items():
        for name in names:
            if name not in store.splits:
                raise BadInput(
                    f"splits.{role}: store {store.path} has no split {name!r}{nearest(name, store.splits)} "
                    f"(it has {', '.join(store.splits)})"
                )
    return roles


def store_specs(grid, store, training):
    """Return the specs with features and views as the store has them; refuse what would be another model."""
    specs = []
    views = {name: store[name].views for name in training}
    for spec in grid.specs:
        try:
            feature = store.manifest.feature(spec.features)
        except BadInput as error:
            raise BadInput(f"probe group {spec.name!r}: {error.message}") from None
        if feature.kind == "tokens" and spec.head.type != "attentive":
            raise BadInput(
                f"probe group {spec.name!r}: only an attentive head reads {feature}; take {feature.layer}:cls, :patch_mean or :spatial"
            )
        if feature.kind in ("pooled", "patch_mean") and not spec.head.pools_first:
            otherwise = "" if spec.head.type == "attentive" else ", or say pool: before if that is what you want"
            raise BadInput(
                f"probe group {spec.name!r}: a head of type {spec.head.type} on {feature} is another model than on "
                f"the map; take {feature.layer}:spatial{otherwise}"
            )
        if spec.head.heads and input_shape(store, str(feature), False)[0] % spec.head.heads:
            raise BadInput(
                f"probe group {spec.name!r}: {spec.head.heads} attention heads do not divide {feature}, which is "
                f"{input_shape(store, str(feature), False)[0]} wide"
            )
        head = replace(spec.head, offset=logit_offset(spec.head.offset, len(store.classes)))
        specs.append(replace(spec, features=str(feature), head=head, views=_resolve_views(spec, store, views)))
        if specs[-1].conflict:
            raise BadInput(f"probe group {spec.name!r}: {specs[-1].conflict}")
    if len({spec.id for spec in specs}) < len(specs):
        raise BadInput(
            f"the grid names a probe twice: features and views that it writes differently are one in store {store.path}"
        )
    return specs


def _resolve_views(spec, store, views):
    """The number of views that a probe trains on. views: {training split: how many the store has}."""
    if spec.views is None and len(set(views.values())) == 1:
        return next(iter(views.values()))
    if spec.views is not None and spec.views <= min(views.values()):
        return spec.views
    there = ", ".join(f"{count} of {name}" for name, count in views.items())
    asked = "all views" if spec.views is None else f"{spec.views} views"
    raise BadInput(
        f"probe group {spec.name!r} trains on {asked}; store {store.path} has {there}: write views: 0 for the "
        "images as they are, or extract with --views"
    )


def _finished(folder, basis, key, wanted):
    """Whether `folder` is a finished run of this grid, and whole. Raises BadInput if it is a run on other data."""
    # An empty folder is what the lock on it has just made.
    if not any(folder.iterdir()):
        return False
    there = read_summary(folder)
    if "imported" in there:
        raise BadInput(f"run {folder} holds imported probes; train into another --run")
    for field, value in basis.items():
        if there.get(field) != value:
            raise BadInput(
                f"run {folder} was made with {field} {there.get(field)!r}, not {value!r}; choose another --run"
            )
    return there.get("key") == key and all(path.is_file() for path in wanted)


def _begin(folder, basis, resolved):
    """Make the run folder; its run.json has no key, and so is unfinished, until all is written."""
    try:
        (folder / "probes").mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(basis, indent=1) + "\n")
        write_whole(folder / "grid.yaml", yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None
