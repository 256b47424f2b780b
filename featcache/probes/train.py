"""`featcache train-probes`: a grid on a store, into a run folder."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import click
import yaml

from featcache.atomic import write_whole
from featcache.device import choose_device
from featcache.errors import BadInput, shown
from featcache.probes.grids.grid import load_grid
from featcache.probes.resolve import resolve
from featcache.probes.run import FILE, open_run, read_summary
from featcache.probes.scores.scoring import files, finish_run
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
    found = resolve(checked, opened, device)
    specs, splits = found.specs, found.splits
    if checked.search and ranks.size > 1:
        raise BadInput("search: halving compares all probes: start it in one process, without torchrun")
    resolved = checked.content | {
        "store": str(source),
        "splits": {role: list(names) for role, names in splits.items()},
        "select": {"metric": found.metric, "split": checked.split},
    }
    # Both decide which weights are kept, so that a run is of one choice.
    chosen_by = {"select": resolved["select"], "search": checked.search and asdict(checked.search)}
    if checked.search:
        # It compares all probes with each other.
        among = hashlib.sha256(" ".join(sorted(spec.id for spec in specs)).encode()).hexdigest()
        chosen_by["search"]["among"] = f"{len(specs)} probes ({among[:8]})"
    basis = {"store_id": opened.id, "seed": seed, "splits": resolved["splits"]} | chosen_by
    asked = [basis, resolved["probes"], *([checked.rules] if checked.rules else [])]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    basis["parity"] = checked.parity
    stem = "grid" if isinstance(grid, dict) else Path(grid).stem
    folder = Path(run or Path("runs") / f"{stem}-{key[:8]}")
    planned = plan_buffers(specs, opened, splits, memory, device, ranks.local_size)
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
        judge = (found.metric, checked.split)
        train_missing(folder, specs, opened, splits, device, seed, judge, basis.get("buffers"), checked.search, ranks)
        if not leads:
            return None
        basis |= {"key": key, "store": str(source)}
        return finish_run(folder, specs, opened, splits, basis, device, started, checked.intervals)


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
