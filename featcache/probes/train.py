"""`featcache train-probes`: a grid on a store, into a run folder."""

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import click
import yaml

from featcache.arguments import FLAG, NAME, PATH, takes, whole
from featcache.atomic import local_path
from featcache.device import choose_device
from featcache.errors import BadInput, of_the_system, shown
from featcache.probes.grids.grid import load_grid
from featcache.probes.mend import drop_damaged, kept_files, without_summary
from featcache.probes.probe_file import find_probes, load_specs
from featcache.probes.resolve import resolve, undecided
from featcache.probes.run import open_run
from featcache.probes.run_file import PROBES, holds_run, identity, read_summary, write_file, write_summary
from featcache.probes.scores.scoring import finish_run
from featcache.probes.sweep import plan_buffers, train_missing
from featcache.probes.tables import read_table
from featcache.ranks import join_ranks
from featcache.store.folder import open_folder
from featcache.store.reader import open_store

# Of a run's first grid; later ones have the beginning of their key in the name.
GRID = "grid.yaml"


@takes(store=PATH, run=PATH, seed=whole(), parity=NAME, allow_overlap=FLAG)
def train_probes(grid, store=None, run=None, device=None, seed=0, parity=None, memory=None, allow_overlap=False):
    """Train all probes of a grid on a store's features, score them, and write a run folder.

    grid: path of a YAML file, or its content as a dict. store: path; by default the grid's own.
    run: folder; by default runs/<grid>-<id>. device: torch device. seed: of the mini-batches' order.
    parity: name of one of the grid's profiles, such as how-to-probe. memory: bytes of features to hold,
    by default half of what is free; larger ones are streamed from the store. allow_overlap: train although
    two roles share images; how many is recorded in run.json.
    Returns the Run; under torchrun, whose processes share the blocks, None in all but the first. Probes that
    the folder holds already are not trained again, and those of earlier grids are scored with the new ones; a
    finished run of the same grid is returned at once. Raises BadInput.
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
    found = resolve(checked, opened, device, allow_overlap)
    specs, splits = found.specs, found.splits
    if found.notice and ranks.rank == 0:
        click.echo(f"notice: {found.notice}", err=True)
    if checked.search and ranks.size > 1:
        raise BadInput("search: halving compares all probes: start it in one process, without torchrun")
    resolved = checked.content | {
        "store": str(source),
        "splits": {role: list(names) for role, names in splits.items()},
        "select": {"metric": found.metric} | ({"split": found.split} if found.split else {}),
        **({"allow_overlap": True} if found.overlaps else {}),
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
    folder = local_path(run or Path("runs") / f"{stem}-{key[:8]}", "--run")
    planned = plan_buffers(specs, opened, splits, memory, device, ranks.local_size)
    started = time.monotonic()
    place = open_folder(folder)
    with ranks.leading(place.locked(f"waiting: another process is training into {folder}")) as leads:
        everything = specs
        if leads:
            place.sweep()
            begun = _begun(folder, basis)
            grids = _grids(begun)
            known = begun if "store_id" in begun else basis | {"files": {}} | begun
            whole = drop_damaged(folder, known, grids.get(key))
            there = find_probes(folder)
            whole &= there.keys() >= {spec.id for spec in specs} and begun.get("probes") == len(there)
            if "key" in begun and key in grids and whole:
                ranks.share([])
                click.echo(f"run: {folder} is finished already", err=True)
                return open_run(folder)
            others = _others(folder, specs, there, _names(folder, begun))
            everything = specs + others
            if found.split is None and (reason := undecided(everything)):
                raise BadInput(f"run {folder}, with this grid: {reason}; or choose another --run")
            if others:
                click.echo(
                    f"run: {len(others)} probes of other grids are in {folder}, and stay in its scores", err=True
                )
            # How features were read decides the order of the rows, so a begun run stays with it.
            basis |= {"buffers": planned | begun.get("buffers", {}), "grids": grids}
            # What an earlier grid asked for stays.
            asked_for = {*checked.intervals, *begun.get("intervals", ())}
            basis["intervals"] = [role for role in splits if role in asked_for]
            basis["files"] = kept_files(folder, begun, grids.get(key)) if "store_id" in begun else {}
            if others:
                # In the scores they are called so until the tables are written anew.
                basis["others"] = {spec.id: spec.name for spec in others}
            grids[key], own = _begin(folder, basis, grids.get(key), key, resolved)
            basis["files"] |= own
            basis.pop("others", None)
        judge, buffers, run_id = (found.metric, found.split), basis.get("buffers"), identity(basis)
        train_missing(folder, specs, opened, splits, device, seed, judge, buffers, checked.search, ranks, run_id)
        if not leads:
            return None
        basis |= {"key": key, "store": str(source), "overlap": [asdict(overlap) for overlap in found.overlaps]}
        return finish_run(folder, everything, opened, splits, basis, device, started, basis["intervals"])


def _begun(folder, basis):
    """What run.json says of a run that is there, finished or not; {} for a new one. Raises BadInput on other data."""
    # An empty folder is what the lock on it has just made.
    if not any(folder.iterdir()):
        return {}
    try:
        there = read_summary(folder)
    except BadInput as error:
        if not holds_run(folder):
            raise
        return without_summary(folder, basis, error.message)
    if "imported" in there:
        raise BadInput(f"run {folder} holds imported probes; train into another --run")
    for field, value in basis.items():
        if there.get(field) != value:
            raise BadInput(
                f"run {folder} was made with {field} {there.get(field)!r}, not {value!r}; choose another --run"
            )
    return there


def _grids(begun):
    """The grids of a run, {key: name of the file in its folder}; runs of older versions have one, and do not say so."""
    return begun.get("grids") or ({begun["key"]: GRID} if "key" in begun else {})


def _names(folder, begun):
    """Names of the probes in a run folder, {id: name} in the order of its scores. begun: of run.json."""
    if "others" in begun:
        return begun["others"]
    try:
        return {row["probe"]: row["name"] for row in read_table(folder, "scores.csv", begun.get("files"))}
    except (KeyError, ValueError):
        # There are none yet, or they are damaged, which has been said: a probe's own name is that of its first grid.
        return {}


def _others(folder, specs, there, names):
    """Specs of the probes in a run folder that other grids trained. there: of find_probes. names: of _names."""
    others = there.keys() - {spec.id for spec in specs}
    order = {probe: place for place, probe in enumerate(names)}
    found = sorted(load_specs(folder, others, there), key=lambda spec: (order.get(spec.id, len(order)), spec.id))
    return [replace(spec, name=names.get(spec.id, spec.name)) for spec in found]


def _begin(folder, basis, name, key, resolved):
    """Make the run folder; its run.json has no key, and so is unfinished, until all is written.

    name: of the grid's file, None for a grid that is new here. Returns it, and {it: its entry in run.json}.
    """
    data = yaml.safe_dump(resolved, sort_keys=False).encode()
    try:
        (folder / PROBES).mkdir(parents=True, exist_ok=True)
        if name is None:
            # Older versions did not note the key of a grid before they had trained it.
            first = folder / GRID
            name = GRID if not first.exists() or _same(first, data) else f"grid-{key[:8]}.yaml"
        # The file is not listed before it is written.
        write_summary(folder, basis | {"grids": basis["grids"] | {key: name}})
        own = {name: write_file(folder, name, data)}
    except OSError as error:
        raise BadInput(f"cannot write run folder {folder}: {of_the_system(error)}") from None
    return name, own


def _same(path, data):
    return path.is_file() and path.read_bytes() == data
