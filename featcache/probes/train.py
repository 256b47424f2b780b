"""`featcache train-probes`: train a grid of probes on a store into a run folder."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from featcache.arguments import FLAG, NAME, PATH, takes, whole
from featcache.atomic import local_path
from featcache.device import choose_device
from featcache.errors import BadInput, of_the_system, shown
from featcache.probes.engine.sweep import train_missing
from featcache.probes.engine.waves import Buffers, plan_buffers
from featcache.probes.finish import finish_run
from featcache.probes.grids.grid import Grid, load_grid
from featcache.probes.grids.selection import NOTHING, Refit
from featcache.probes.refit import as_refits, chosen_refits, why_no_refit
from featcache.probes.resolve import Resolved, resolve, undecided
from featcache.probes.runs.key import RunBasis
from featcache.probes.runs.mend import drop_damaged, kept_files, known_store, without_summary
from featcache.probes.runs.probe_file import Place, find_probes, load_specs
from featcache.probes.runs.run import Run, open_run
from featcache.probes.runs.run_file import (
    PROBES,
    holds_run,
    identity,
    probes_held,
    read_summary,
    write_file,
    write_summary,
)
from featcache.probes.runs.tables import read_table
from featcache.probes.sample import FOLDS
from featcache.probes.spec import ProbeSpec, spec_from_dict, spec_to_dict
from featcache.progress import say
from featcache.ranks import join_ranks
from featcache.store.folder import open_folder
from featcache.store.reader import Store, open_store

# The file of a run's first grid. Later grids have the beginning of their key in the name of their file.
GRID = "grid.yaml"


@dataclass(frozen=True)
class Task:
    """A grid on a store, ready to be trained.

    source: path of the store, as it was given. content: the grid's content, with the names of the store. key:
    identifies the grid in its run.
    """

    grid: Grid
    store: Store
    source: str
    resolved: Resolved
    content: dict[str, Any]
    basis: RunBasis
    key: str


class Chosen(Protocol):
    """What a grid comes to; see Resolved."""

    @property
    def specs(self) -> list[ProbeSpec]: ...
    @property
    def splits(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def chosen_on(self) -> str | None: ...


class Asked(Protocol):
    """A grid and its place in a run; see Task."""

    @property
    def grid(self) -> Grid: ...
    @property
    def resolved(self) -> Chosen: ...
    @property
    def content(self) -> dict[str, Any]: ...
    @property
    def basis(self) -> RunBasis: ...
    @property
    def key(self) -> str: ...


@takes(store=PATH, run=PATH, seed=whole(), parity=NAME, allow_overlap=FLAG)
def train_probes(
    grid: str | PathLike[str] | dict[str, Any],
    store: str | PathLike[str] | None = None,
    run: str | PathLike[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    parity: str | None = None,
    memory: float | None = None,
    allow_overlap: bool = False,
) -> Run | None:
    """Train all probes of a grid on a store's features, score them, and write a run folder.

    grid: path of a YAML file, or its content as a dict. store: path, by default the grid's own. run: folder, by
    default runs/<grid>-<id>. device: torch device. seed: draws the order of the mini-batches. parity: name of one of
    the grid's profiles, such as how-to-probe. memory: bytes of features to hold, by default half of what is free; if
    they need more, they are streamed from the store. The search of kNN probes keeps within it in all that it holds.
    allow_overlap: train although two roles share images; run.json records how many.

    Returns the Run. Under torchrun the processes share the blocks, and all but the first return None. Probes that the
    folder already holds are not trained again, those of earlier grids are scored with the new ones, and a finished run
    of the same grid is returned at once. Raises BadInput.

        run = featcache.train_probes("grid.yaml", store="features/voc-resnet50-1a2b3c4d.zarr", device="cuda")
        print(run.scores[0]["value"])
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise BadInput(f"seed: expected a whole number from 0 to {2**32 - 1}, not {shown(seed)}")
    loaded = load_grid(grid, parity)
    stem = "grid" if isinstance(grid, dict) else Path(grid).stem
    return train_grid(loaded, stem, store, run, device, seed, memory, allow_overlap)


def train_grid(
    grid: Grid,
    stem: str,
    store: str | PathLike[str] | None,
    run: str | PathLike[str] | None,
    device: str | None = None,
    seed: int = 0,
    memory: float | None = None,
    allow_overlap: bool = False,
    notices: Sequence[str] = (),
) -> Run | None:
    """Train a grid that was read; see train_probes. stem: what the name of a new run folder begins with. notices: lines
    to say before.
    """
    started, ranks = time.monotonic(), join_ranks()
    chosen_device = choose_device(device, ranks.local_rank)
    task, folder = _place(grid, store, run, stem, chosen_device, seed, allow_overlap)
    specs, splits, search = task.resolved.specs, task.resolved.splits, task.grid.search
    for line in (*notices, *([f"notice: {task.resolved.notice}"] if task.resolved.notice else ())):
        ranks.say(line)
    if search and ranks.size > 1:
        raise BadInput("search: halving compares all probes: start it in one process, without torchrun")
    sets, refit = task.resolved.sets, task.grid.refit
    folds = [fold for spec in specs for fold in spec.with_folds(task.resolved.folds or 0)]

    def plan(chosen: Iterable[ProbeSpec]) -> Buffers:
        return plan_buffers(chosen, sets, memory, chosen_device, ranks.local_size)

    buffers = plan([*specs, *folds, *(as_refits(specs, refit) if refit else ())])
    place = open_folder(folder)
    with ranks.leading(place.locked(f"waiting: another process is training into {folder}")) as leads:
        summary, others = task.basis.to_json(), list[ProbeSpec]()
        if leads:
            place.sweep()
            begun = begin_run(folder, task, folds, buffers, plan)
            if begun is None:
                # Neither probes nor refits are left to train.
                ranks.share([])
                ranks.share([])
                say(f"run: {folder} is finished already")
                return open_run(folder)
            summary, others = begun
            sets.subsets.update({name: str(entry["list"]) for name, entry in _lists(summary).items()})
            # What may be wrong with the lists of other grids is said before anything is trained.
            for spec in others:
                if spec.fold:
                    sets[spec.sample]
            buffers = summary["buffers"]
        metric, role = task.resolved.metric, task.resolved.chosen_on
        selection, run_id = (metric, None if role == FOLDS else role), identity(summary)
        trained = [*specs, *folds]
        train_missing(folder, trained, sets, chosen_device, seed, selection, buffers, search, ranks, run_id)
        everything, refits = [*specs, *(s for s in others if not (s.fold or s.refit))], list[ProbeSpec]()
        if leads and (refit := _refit(task.grid, summary)):
            assert role is not None, "a refit is chosen on val"
            refits = chosen_refits(folder, everything, sets, (metric, role), refit, chosen_device, memory)
        if leads:
            ranks.share([(spec_to_dict(spec),) for spec in refits])
        else:
            refits = [spec_from_dict(content) for (content,) in ranks.shared(otherwise=[])]
        if refits:
            train_missing(folder, refits, sets, chosen_device, seed, selection, buffers, None, ranks, run_id)
        if not leads:
            return None
        everything += refits
        # Refits of what was best before another grid came, and probes of other grids that hold folds out.
        known = {spec.id for spec in everything}
        everything += [*folds, *(s for s in others if s.id not in known)]
        overlaps = [asdict(overlap) for overlap in task.resolved.overlaps]
        samples = {s.sample.name: sets.described(s.sample) for s in specs if s.sample.partial}
        samples = summary.get("samples", {}) | samples
        summary |= {"key": task.key, "store": task.source, "overlap": overlaps} | (
            {"samples": samples} if samples else {}
        )
        return finish_run(
            folder, everything, task.store, splits, summary, chosen_device, started, summary["intervals"], sets, memory
        )


def _place(
    grid: Grid,
    store: str | PathLike[str] | None,
    run: str | PathLike[str] | None,
    stem: str,
    device: torch.device,
    seed: int,
    allow_overlap: bool,
) -> tuple[Task, Path]:
    """Return the Task of a grid, and its run folder. stem: what the name of a new folder begins with. Raises BadInput."""
    source = store or grid.store
    if source is None:
        raise BadInput("no store: give --store, or write store: PATH into the grid")
    opened = open_store(source)
    if run is not None:
        folder = local_path(run, "--run")
        return _prepare(grid, known_store(opened, folder), str(source), device, seed, allow_overlap), folder
    # A run from before the store grew has the store's id of then in its name.
    for id in opened.ids[:-1]:
        try:
            task = _prepare(grid, opened.known_as(id), str(source), device, seed, allow_overlap)
        except BadInput:
            continue
        folder = local_path(Path("runs") / f"{stem}-{task.key[:8]}", "--run")
        if holds_run(folder):
            return task, folder
    task = _prepare(grid, opened, str(source), device, seed, allow_overlap)
    return task, local_path(Path("runs") / f"{stem}-{task.key[:8]}", "--run")


def _prepare(grid: Grid, opened: Store, source: str, device: torch.device, seed: int, allow_overlap: bool) -> Task:
    """Fit a grid to its store and identify it in its run. source: path of the store. Raises BadInput."""
    resolved = resolve(grid, opened, device, allow_overlap)
    content = grid.content | {
        "store": source,
        "splits": {role: list(names) for role, names in resolved.splits.items()},
        "select": {"metric": resolved.metric} | chosen_split(grid, resolved.chosen_on, resolved.folds),
        **({"allow_overlap": True} if resolved.overlaps else {}),
    }
    search = None
    if grid.search:
        # A search compares all probes with each other, so its result depends on which they are.
        among = hashlib.sha256(" ".join(sorted(spec.id for spec in resolved.specs)).encode()).hexdigest()
        search = grid.search.model_dump() | {"among": f"{len(resolved.specs)} probes ({among[:8]})"}
    select = {key: value for key, value in content["select"].items() if value != NOTHING}
    select |= {"split": FOLDS, "folds": str(resolved.folds)} if resolved.folds else {}
    basis = RunBasis(opened.id, seed, content["splits"], select, search, grid.parity)
    return Task(grid, opened, source, resolved, content, basis, basis.key(content["probes"], grid.rules))


def chosen_split(grid: Grid, chosen_on: str | None, folds: int | None = None) -> dict[str, Any]:
    """Return the split or the folds of `select`, as the grid's content has them."""
    if folds:
        return {"folds": folds}
    split = NOTHING if grid.reports_all else chosen_on
    return {"split": split} if split else {}


def _lists(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {NAME#DIGEST: its entry in run.json} of the lists of images that grids of a run trained on."""
    samples: dict[str, dict[str, Any]] = summary.get("samples", {})
    return {name.removeprefix("subset "): entry for name, entry in samples.items() if "list" in entry}


def _refit(grid: Grid, summary: Mapping[str, Any]) -> Refit | None:
    """Return which chosen probes of a run are trained again: what this grid says, or else an earlier one."""
    if grid.refit or "refit" not in summary:
        return grid.refit
    return Refit(tuple(summary["refit"]["on"]), tuple(summary["refit"]["per"]))


def begin_run(
    folder: Path,
    task: Asked,
    folds: Sequence[ProbeSpec],
    planned: Buffers,
    plan: Callable[[Iterable[ProbeSpec]], Buffers],
    facts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[ProbeSpec]] | None:
    """Start a run folder, or go on with one. Its run.json gets a key, which marks it finished, only at the very end.

    folds: of the grid's probes, with a fold held out. planned: how features would be read in a new run. plan: the
    function that says so. facts: further fields of run.json. Returns (content of run.json so far, the specs of the probes in the folder that are not of
    this grid), or None if this grid is finished already. Raises BadInput if the folder holds something else.
    """
    basis, specs = task.basis.to_json(), task.resolved.specs
    begun = _begun(folder, basis)
    grids = _grids(begun)
    known = begun if "store_id" in begun else basis | {"files": {}} | begun
    whole = drop_damaged(folder, known, grids.get(task.key))
    places = find_probes(folder)
    whole &= places.keys() >= {spec.id for spec in [*specs, *folds]}
    whole &= "probes" in begun and probes_held(begun) == len(places)
    if "key" in begun and task.key in grids and whole:
        return None
    others = _others(folder, [*specs, *folds], places, _names(folder, begun))
    of_grids = [spec for spec in others if not (spec.fold or spec.refit)]
    everything = [*specs, *of_grids]
    refit = _refit(task.grid, begun)
    if refit and begun.get("refit", refit.to_json()) != refit.to_json():
        raise BadInput(
            f"run {folder} was made with refit {begun['refit']}, not {refit.to_json()}; choose another --run"
        )
    if refit:
        splits, chosen_on = task.resolved.splits, task.resolved.chosen_on
        if reason := next(why_no_refit(refit, everything, splits, chosen_on), None):
            raise BadInput(f"run {folder}, with this grid: refit: {reason}; or choose another --run")
        planned = planned | plan(as_refits(everything, refit))
    if task.resolved.chosen_on is None and not task.grid.reports_all and (reason := undecided(everything)):
        raise BadInput(f"run {folder}, with this grid: {reason}; or choose another --run")
    if of_grids:
        say(f"run: {len(of_grids)} probes of other grids are in {folder}, and stay in its scores")
    asked_for = {*task.grid.intervals, *begun.get("intervals", ())}
    summary = {
        **basis,
        **(facts or {}),
        # How features are read decides the order of the rows, so a run never changes it.
        "buffers": planned | begun.get("buffers", {}),
        "grids": grids,
        # Intervals that an earlier grid asked for stay.
        "intervals": [role for role in task.resolved.splits if role in asked_for],
        "files": kept_files(folder, begun, grids.get(task.key)) if "store_id" in begun else {},
        **({"samples": begun["samples"]} if "samples" in begun else {}),
        **({"refit": refit.to_json()} if refit else {}),
    }
    # run.json keeps the names of these probes until the tables, which also have them, are written anew.
    names = {"others": {spec.id: spec.name for spec in others}} if others else {}
    name, own = _write_grid(folder, summary | names, task, grids.get(task.key))
    return summary | {"grids": grids | {task.key: name}, "files": summary["files"] | own}, others


def _write_grid(
    folder: Path, summary: dict[str, Any], task: Asked, name: str | None
) -> tuple[str, dict[str, dict[str, int]]]:
    """Write run.json and the file of the grid. name: of that file, None if the grid is new in this run.

    Returns the name, and {name: its entry in run.json}. Raises BadInput if they cannot be written.
    """
    data = yaml.safe_dump(task.content, sort_keys=False).encode()
    try:
        (folder / PROBES).mkdir(parents=True, exist_ok=True)
        if name is None:
            # An unfinished run of an older version has the file, but does not list the grid in run.json.
            first = folder / GRID
            name = GRID if not first.exists() or _same(first, data) else f"grid-{task.key[:8]}.yaml"
        # `files` lists the file only after it is written.
        write_summary(folder, summary | {"grids": summary["grids"] | {task.key: name}})
        return name, {name: write_file(folder, name, data)}
    except OSError as error:
        raise BadInput(f"cannot write run folder {folder}: {of_the_system(error)}") from None


def _begun(folder: Path, basis: dict[str, Any]) -> dict[str, Any]:
    """Return the run.json of a run, finished or not, {} for a new one. Raises BadInput if the folder holds anything else."""
    # Locking a new folder has just created it, empty.
    if not any(folder.iterdir()):
        return {}
    try:
        summary = read_summary(folder)
    except BadInput as error:
        if not holds_run(folder):
            raise
        return without_summary(folder, basis, error.message)
    if "imported" in summary:
        raise BadInput(f"run {folder} holds imported probes; train into another --run")
    for field, value in basis.items():
        if summary.get(field) != value:
            raise BadInput(
                f"run {folder} was made with {field} {summary.get(field)!r}, not {value!r}; choose another --run"
            )
    return summary


def _grids(begun: dict[str, Any]) -> dict[str, str]:
    """Return {key: file name} of the grids of a run. Runs of older versions have a single one, which they do not list."""
    return begun.get("grids") or ({begun["key"]: GRID} if "key" in begun else {})


def _names(folder: Path, begun: dict[str, Any]) -> dict[str, str]:
    """Return {id: name} of the probes in a run folder, in the order of its scores. begun: the content of run.json."""
    if "others" in begun:
        return begun["others"]
    try:
        return {row["probe"]: row["name"] for row in read_table(folder, "scores.csv", begun.get("files"))}
    except (KeyError, ValueError):
        # There are no scores yet, or they are damaged, as a notice has said. Probes then keep the names in their specs.
        return {}


def _others(
    folder: Path, specs: Sequence[ProbeSpec], places: dict[str, Place], names: dict[str, str]
) -> list[ProbeSpec]:
    """Return the specs of the probes in a run folder that other grids trained, in the order of names."""
    others = places.keys() - {spec.id for spec in specs}
    order = {probe: place for place, probe in enumerate(names)}
    specs = sorted(load_specs(folder, others, places), key=lambda spec: (order.get(spec.id, len(order)), spec.id))
    return [replace(spec, name=names.get(spec.id, spec.name)) for spec in specs]


def _same(path: Path, data: bytes) -> bool:
    """Return whether a file exists and has these bytes."""
    return path.is_file() and path.read_bytes() == data
